"""The replay judges each window under what was known before it, and says what a recording lacks."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benthic.config.schema import RunConfig
from benthic.errors import InputError
from benthic.parallel.placement import balanced
from benthic.parallel.replay import read_loads, replay

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "expert_placement.py"


def skewed(records: int, seed: int = 0) -> torch.Tensor:
    """Records (T, 2, 16) whose experts differ much, and little from one record to the next."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(2, 16, generator=generator).exp() * 100
    return torch.poisson(base.expand(records, 2, 16), generator=generator)


def test_steady_loads_are_balanced_by_their_past():
    result = replay(skewed(40), window=8, slots=24, gpus=8, nodes=2, groups=4)
    assert result.windows == 4
    assert result.before.gpu_mean > 1.5
    assert result.after.gpu_mean < 1.25
    assert 1 <= result.hindsight.gpu_mean <= result.after.gpu_mean
    assert result.after.node_mean < result.before.node_mean
    assert result.after.gpu_mean <= result.after.gpu_worst


def test_figures_are_those_of_a_sum_over_slots():
    loads = skewed(4, seed=1)
    first, second = loads[:2].sum(0), loads[2:].sum(0)
    placement = balanced(first, slots=24, gpus=4)
    ratios = []
    for layer in range(2):
        gpu = [0.0] * 4
        for slot, expert in enumerate(placement.expert_MS[layer].tolist()):
            gpu[slot // 6] += float(second[layer, expert]) / placement.expert_MS[layer].tolist().count(expert)
        ratios.append(max(gpu) / (sum(gpu) / 4))
    result = replay(loads, window=2, slots=24, gpus=4)
    assert result.after.gpu_mean == pytest.approx(sum(ratios) / 2)
    assert result.after.gpu_worst == pytest.approx(max(ratios))
    assert result.after.node_mean == 1


def test_the_past_is_of_no_use_when_loads_turn_over():
    """Only the experts that rested in one window work in the next: what was placed by the past is the worst case."""
    first = torch.tensor([1000.0] * 2 + [1.0] * 6)
    loads = torch.stack([first, first.flip(0)] * 3)[:, None]
    result = replay(loads, window=1, slots=12, gpus=4)
    assert result.hindsight.gpu_mean < 1.4 < 1.8 < result.after.gpu_mean
    assert result.moved > 0.3


def test_what_stays_is_not_moved():
    loads = skewed(1).expand(6, 2, 16)
    assert replay(loads, window=2, slots=24, gpus=8).moved == 0


def test_experts_that_cannot_be_dealt_equally_have_no_before():
    assert replay(skewed(4), window=2, slots=18, gpus=6).before is None


def test_a_recording_too_short_is_refused():
    with pytest.raises(InputError, match="at least two windows"):
        replay(skewed(5), window=3, slots=16, gpus=4)
    with pytest.raises(InputError, match="window=0"):
        replay(skewed(5), window=0, slots=16, gpus=4)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([{"step": 1}], "no row has expert_load"),
        ([{"expert_load": [[1, 2]]}, {"expert_load": [[1, 2, 3]]}], "line 2: expert_load is of 3 experts: must be 2"),
        ([{"expert_load": [[1, -2]]}], "line 1"),
        ([{"expert_load": [1, 2]}], "line 1"),
        ([{"expert_load": [["a"]]}], "line 1"),
        ([{"expert_load": []}], "line 1"),
        ([{"expert_load": [[1], [1, 2]]}], "line 1"),
    ],
)
def test_a_file_that_is_no_recording_is_refused(tmp_path: Path, lines: list, said: str):
    file = tmp_path / "loads.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=said):
        read_loads(file)
    file.write_text("{oops\n")
    with pytest.raises(InputError, match="line 1"):
        read_loads(file)


def test_layers_that_begin_late_are_left_out(tmp_path: Path):
    file, loads = tmp_path / "loads.jsonl", skewed(6)
    rows = [{"expert_load": record[: 1 + (number in (2, 3))].tolist()} for number, record in enumerate(loads)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert torch.equal(read_loads(file), loads[:, :1])


def test_a_recording_of_mtp_modules_that_are_trained_late(
    tiny_run_config: Callable[..., RunConfig], make_run: Callable[..., Path]
):
    from benthic.train.loop import train

    run = make_run()
    train(tiny_run_config(steps=6, expert_load_every=1, schedule={"mtp_loss_weight": 0.0, "mtp_late_start": 0.5}), run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {len(row["expert_load"]) for row in rows if "expert_load" in row} == {1, 2}
    assert read_loads(run / "metrics.jsonl").shape == (6, 1, 8)


def test_training_records_loads_when_asked(
    tiny_run_config: Callable[..., RunConfig], make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    from benthic.train.loop import train

    run = make_run()
    train(tiny_run_config(steps=8, expert_load_every=2), run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "expert_load" in row] == [2, 4, 6, 8]
    loads = read_loads(run / "metrics.jsonl")
    assert loads.shape == (4, 2, 8)  # one sparse layer and one MTP module
    assert bool((loads.sum(-1) == 4 * 32 * 2).all())  # sequences, tokens, experts per token
    row = next(row for row in rows if "expert_load" in row)
    measured = loads[0].amax(-1) / loads[0].mean(-1)
    assert measured.tolist() == pytest.approx(row["expert_load_max_over_mean"])

    spec = importlib.util.spec_from_file_location("expert_placement", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    capsys.readouterr()
    arguments = ["--gpus", "4", "--nodes", "2", "--groups", "4", "--redundant", "4", "--window", "1"]
    script.main([str(run / "metrics.jsonl"), *arguments, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["windows"] == 3
    assert printed["after"]["gpu_mean"] >= printed["hindsight"]["gpu_mean"] * 0.9
    script.main([str(run / "metrics.jsonl"), *arguments])
    assert "placed by the window before" in capsys.readouterr().out
