"""The ledger adds up over interruptions, prices and stages, and counts nothing twice."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benthic.plan.power import PROCESSORS, watts_per_core
from benthic.train import energy, ledger
from benthic.train.energy import CodecarbonEnergy, EstimatedEnergy, open_energy_meter
from benthic.train.ledger import Ledger
from benthic.train.loop import train

HOUR = 3600.0


class Clock:
    """Seconds that pass only when told."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(ledger, "monotonic", lambda: self.now)
        monkeypatch.setattr(energy, "monotonic", lambda: self.now)
        monkeypatch.setattr(ledger, "open_energy_meter", lambda: EstimatedEnergy(500.0))


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def stages(run) -> dict:
    return json.loads((run / "ledger.json").read_text())["stages"]


def test_time_energy_and_money_of_a_stage(tmp_path, clock):
    with Ledger(tmp_path, "pretrain", price_per_hour=2.0, devices=8) as account:
        clock.now += 3 * HOUR
        account.update(7000, 9e12)
    assert stages(tmp_path)["pretrain"] == {
        "tokens": 7000, "flops": 9e12, "wall_hours": 3.0, "device_hours": 24.0,
        "energy_kwh": 1.5, "energy_source": "estimated", "cost_usd": 48.0,
    }  # fmt: skip


def test_what_a_stage_was_computed_with_is_kept_once_for_each_difference(tmp_path, clock, monkeypatch):
    def made_with():
        return json.loads((tmp_path / "ledger.json").read_text())["made_with"]

    def spend(stage):
        with Ledger(tmp_path, stage) as account:
            account.update(1, 1.0)

    spend("pretrain")
    spend("pretrain")
    here = made_with()["pretrain"]
    assert len(here) == 1
    assert (here[0]["torch"], here[0]["threads"]) == (torch.__version__, torch.get_num_threads())
    monkeypatch.setattr(ledger.platform, "python_version", lambda: "4.0")
    spend("pretrain")
    spend("sft")
    there = {**here[0], "python": "4.0"}
    assert made_with() == {"pretrain": [*here, there], "sft": [there]}


def test_it_is_written_twice_a_minute_and_what_a_kill_loses_is_less(tmp_path, clock):
    killed = Ledger(tmp_path, "pretrain", price_per_hour=3600.0)
    killed.__enter__()
    for second in range(1, 100):
        clock.now += 1
        killed.update(second, float(second))
    assert stages(tmp_path)["pretrain"]["tokens"] == 90
    clock.now += HOUR  # nobody runs
    with Ledger(tmp_path, "pretrain", price_per_hour=3600.0) as resumed:
        clock.now += 10
        resumed.update(80, 80.0)  # the checkpoint it went on from was older
    entry = stages(tmp_path)["pretrain"]
    assert (entry["tokens"], entry["cost_usd"]) == (80, pytest.approx(100.0))
    assert entry["wall_hours"] == pytest.approx(100 / HOUR)
    assert entry["energy_kwh"] == pytest.approx(0.5 * 100 / HOUR)


def test_writing_often_adds_nothing(tmp_path, clock):
    with Ledger(tmp_path, "pretrain") as account:
        account.update(1, 1.0)
        for _ in range(20):
            account.write()
            clock.now += 1
    assert stages(tmp_path)["pretrain"]["wall_hours"] == pytest.approx(20 / HOUR)


def test_stages_are_kept_apart_and_prices_may_change(tmp_path, clock):
    for stage, price, hours in (("pretrain", None, 1), ("sft", 2.0, 2), ("pretrain", 3.0, 4), ("sft", None, 8)):
        with Ledger(tmp_path, stage, price_per_hour=price) as account:
            clock.now += hours * HOUR
            account.update(1, 1.0)
    spent = {name: (entry["wall_hours"], entry["cost_usd"]) for name, entry in stages(tmp_path).items()}
    assert spent == {"pretrain": (5.0, 12.0), "sft": (10.0, 4.0)}


def test_without_a_price_there_is_no_cost_and_without_work_no_entry(tmp_path, clock):
    with Ledger(tmp_path, "pretrain") as account:
        account.update(1, 1.0)
    assert stages(tmp_path)["pretrain"]["cost_usd"] is None
    with Ledger(tmp_path, "sft"):
        clock.now += HOUR
    assert stages(tmp_path).keys() == {"pretrain"}


@pytest.mark.parametrize("content", ['{"stages": []}', '{"stages": {"pretrain": 3}}', "{}",
                                     '{"stages": {"pretrain": {"wall_hours": "x", "cost_usd": [1]}}}'])  # fmt: skip
def test_a_ledger_of_another_shape_is_begun_anew(tmp_path, clock, content):
    (tmp_path / "ledger.json").write_text(content)
    with Ledger(tmp_path, "pretrain", price_per_hour=1.0) as account:
        clock.now += HOUR
        account.update(1, 1.0)
    assert stages(tmp_path)["pretrain"]["cost_usd"] == 1.0


class FakeCodecarbon:
    """Uses 0.25 kWh from one flush to the next."""

    def __init__(self, output_handlers, **settings) -> None:
        self.handlers, self.used, self.settings, self.running = output_handlers, 0.0, settings, False

    def start(self) -> None:
        self.running = True

    def flush(self) -> None:
        self.used += 0.25
        for handler in self.handlers:
            handler.out(SimpleNamespace(energy_consumed=self.used), None)

    def stop(self) -> None:
        self.running = False


def test_codecarbon_measures_where_it_is_installed(tmp_path, monkeypatch):
    made = []

    def tracker(**settings):
        made.append(FakeCodecarbon(**settings))
        return made[-1]

    monkeypatch.setattr(energy.importlib.util, "find_spec", lambda name: name == "codecarbon" or None)
    monkeypatch.setitem(sys.modules, "codecarbon", SimpleNamespace(OfflineEmissionsTracker=tracker))
    assert isinstance(open_energy_meter(), CodecarbonEnergy)
    for number in (1, 2):
        with Ledger(tmp_path, "pretrain") as account:
            account.update(1, 1.0)
            account.write()
        entry = stages(tmp_path)["pretrain"]
        assert (entry["energy_kwh"], entry["energy_source"]) == (0.5 * number, "codecarbon")
        assert not made[-1].running
    assert made[0].settings["output_methods"] == []
    monkeypatch.undo()
    monkeypatch.setattr(ledger, "open_energy_meter", lambda: EstimatedEnergy(1.0))
    with Ledger(tmp_path, "pretrain") as account:
        account.update(1, 1.0)
    assert stages(tmp_path)["pretrain"]["energy_source"] == "codecarbon and estimated"


def test_the_table_has_a_figure_for_every_processor():
    assert watts_per_core("AMD EPYC 9654 96-Core Processor") == 3.75
    assert watts_per_core("Intel(R) Xeon(R) Platinum 8480+") == 6.25
    assert watts_per_core("") == watts_per_core("a processor of tomorrow") == 6.0
    assert all(2 < processor.watts / processor.cores < 20 for processor in PROCESSORS.values())


def test_a_run_adds_up_what_it_costs(tiny_run_config, make_run):
    out = make_run()
    train(tiny_run_config(steps=4, price_per_hour=5.0), out)
    entry = stages(out)["pretrain"]
    assert entry["cost_usd"] == pytest.approx(5.0 * entry["device_hours"])
    before = entry["wall_hours"]
    train(tiny_run_config(steps=4, price_per_hour=5.0), out)  # nothing is left to do
    assert stages(out)["pretrain"]["wall_hours"] == before
