"""Context extension as stages of a run: what passes from one to the next, and what each leaves behind."""

import gc
import json
import math
import os
import shutil
import signal
import weakref

import pytest
import torch
from interrupted import Killed, assert_same_run, at_step, course, ended, kill

from benthic.config.schema import YarnConfig
from benthic.config.stages import stages
from benthic.data.batches import Batches
from benthic.data.shards import TokenStore
from benthic.errors import InputError
from benthic.evaluate.bits_per_byte import bits_per_byte
from benthic.model import build_model
from benthic.plan.flops import training_flops
from benthic.train import loop
from benthic.train.calibrate import ema_decay
from benthic.train.checkpoint import committed
from benthic.train.loop import train
from benthic.train.metrics import read_metrics
from benthic.train.objective import Objective, prediction_targets
from benthic.train.signals import Interrupted

NAMES = ["pretrain", "extend-1", "extend-2"]
PHASES = [{"sequence_length": 64, "steps": 6}, {"sequence_length": 128, "steps": 5, "learning_rate": 2e-3}]
LENGTH = {"steps": 8, "checkpoint_every": 4, "validate_every": 5, "extend": PHASES}
KINDS = {
    "adamw": {},
    "muon, average, micro-batches": {
        "optimizer": {"name": "muon", "learning_rate": 3e-3}, "ema_span": 0.4, "batch_size": 8, "micro_batch_size": 4,
    },
    "documents": {"mask_documents": True},
}  # fmt: skip


def test_each_stage_leaves_checkpoints_rows_and_an_account(tiny_run_config, make_run):
    out, config = make_run(), tiny_run_config(**LENGTH)
    result = train(config, out)
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    steps = [("pretrain", n) for n in range(1, 9)] + [("extend-1", n) for n in range(1, 7)]
    assert [(row["stage"], row["step"]) for row in rows] == [*steps, *(("extend-2", n) for n in range(1, 6))]
    found = {name: [path.name for path in committed(out / "checkpoints" / name)] for name in NAMES}
    assert found == {"pretrain": ["step-4", "step-8"], "extend-1": ["step-4", "step-6"],
                     "extend-2": ["step-4", "step-5"]}  # fmt: skip
    account = json.loads((out / "ledger.json").read_text())["stages"]
    assert list(account) == NAMES
    # The tokens of a batch, 4 x 32, stay what they are: 2 x 64, then 1 x 128.
    for name, count, length, batch in zip(NAMES, (8, 6, 5), (32, 64, 128), (4, 2, 1), strict=True):
        of_stage = [row for row in rows if row["stage"] == name]
        assert {row["batch_size"] for row in of_stage} == {batch}
        assert account[name]["tokens"] == of_stage[-1]["tokens"] == count * 128
        assert account[name]["flops"] == pytest.approx(count * 128 * training_flops(config.model, length, mtp=True))
        assert account[name]["wall_hours"] > 0
    assert [row["learning_rate"] for row in rows if row["stage"] == "extend-2"] == pytest.approx([2e-3] * 5)
    tail = 3e-3 * 7.3 / 220
    assert [row["learning_rate"] for row in rows if row["stage"] == "extend-1"] == pytest.approx([tail] * 6)
    assert result.config == config
    assert result.model.config.rope_scaling == YarnConfig(factor=4.0, original_max_position_embeddings=32)
    assert result.model.config.max_position_embeddings == 128


def test_validation_reads_at_the_length_of_the_stage(tiny_run_config, make_run):
    out, config = make_run(), tiny_run_config(**LENGTH)
    train(config, out)
    rows = read_metrics(out / "metrics.jsonl")
    for stage in stages(config):
        model = build_model(stage.config.model)
        model.load_state_dict(ended(out, stage.name).tensors["model"])
        measured = {
            length: bits_per_byte(model, TokenStore(out / "data", "val"), sequence_length=length).value
            for length in (32, 64, 128)
        }
        last = [row for row in rows if row["stage"] == stage.name and "validation_bits_per_byte" in row][-1]
        assert last["step"] == stage.config.train.steps
        assert last["validation_bits_per_byte"] == pytest.approx(measured[stage.config.train.sequence_length], rel=1e-6)
        assert len(set(measured.values())) == 3


@pytest.mark.parametrize("number", [1, 2])
def test_a_stage_begins_with_what_the_one_before_ended_with(tiny_run_config, make_run, number):
    # Weights so large that the rotations of attention matter from the start.
    out, config = make_run(), tiny_run_config(model={"initializer_range": 0.2}, **LENGTH)
    train(config, out)
    before, stage = stages(config)[number - 1 : number + 1]
    losses = {}
    for part in (before, stage):
        # The same weights under the rotations of the stage before, and of this one.
        model = build_model(part.config.model)
        model.load_state_dict(ended(out, before.name).tensors["model"])
        settings = stage.config.train
        batch = Batches(TokenStore(out / "data", "train"), settings.sequence_length, 2, seed=number).at(
            0, settings.batch_size
        )
        targets = prediction_targets(batch.tokens_BS, None, 2)
        losses[part.name] = Objective(model)(batch.tokens_BS, None, targets).cross_entropy_K.tolist()
    rows = read_metrics(out / "metrics.jsonl", stage.name)
    assert [rows[0]["loss"], *rows[0]["mtp_losses"]] == pytest.approx(losses[stage.name], rel=1e-6)
    if number == 1:  # both phases rotate alike
        assert losses["pretrain"] != pytest.approx(losses["extend-1"], rel=1e-3)


def test_moments_begin_anew_and_the_average_goes_on(tiny_run_config, make_run):
    out = make_run()
    phases = [{**PHASES[0], "steps": 1}]
    train(tiny_run_config(steps=8, extend=phases, ema_decay=0.75), out)
    before, after = ended(out, "pretrain"), ended(out, "extend-1")
    for name, average in after.tensors["average"].items():
        weights = after.tensors["model"][name]
        torch.testing.assert_close(average, 0.75 * before.tensors["average"][name] + 0.25 * weights)
    steps = {float(value) for name, value in after.tensors["optimizer"].items() if name.endswith(".step")}
    assert steps == {1.0}


def test_a_finished_run_returns_what_it_had(tiny_run_config, make_run, monkeypatch):
    out, config = make_run(), tiny_run_config(**LENGTH)
    first, before = train(config, out), course(out)
    monkeypatch.setattr(loop, "train_step", lambda *a, **k: pytest.fail("trained again"))
    again = train(config, out)
    assert (again.bits_per_byte, course(out)) == (first.bits_per_byte, before)
    for left, right in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(left, right)


# Steps 1 to 8 are of pretraining, 9 to 14 and 15 to 19 of the phases.
@pytest.mark.parametrize(("kind", "moments"), [
    *(("adamw", [moment]) for moment in (6, 9, 12, 15, 18)), *((kind, [3, 9, 10, 15, 19]) for kind in KINDS),
], ids=str)  # fmt: skip
def test_a_run_killed_in_any_stage_goes_on_exactly(tiny_run_config, make_run, monkeypatch, kind, moments):
    config = tiny_run_config(**{**LENGTH, **KINDS[kind]})
    whole, out = make_run("whole"), make_run("killed")
    result = train(config, whole)
    taken = 0
    for moment in moments:
        with monkeypatch.context() as patch:
            # Steps since the last checkpoint, at 4, 8, 12, 14 and 18, are taken again.
            at_step(patch, moment - taken, kill)
            with pytest.raises(Killed):
                train(config, out)
        taken = max(saved for saved in (0, 4, 8, 12, 14, 18) if saved < moment)
    resumed = train(config, out)
    assert resumed.bits_per_byte == result.bits_per_byte
    assert_same_run(out, whole)


def test_a_stage_is_gone_before_the_next_takes_as_much_memory(tiny_run_config, make_run, monkeypatch):
    alive, states = [], weakref.WeakSet()
    original = loop.TrainState.__init__

    def counted(self, *args, **kwargs):
        alive.append(len(states))
        states.add(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(loop.TrainState, "__init__", counted)
    gc.disable()  # what only Python's collector would find stays
    try:
        train(tiny_run_config(**LENGTH), make_run())
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


@pytest.mark.parametrize("stage", range(3))
def test_a_signal_during_a_stages_last_validation_is_heeded(tiny_run_config, make_run, monkeypatch, stage):
    out, config = make_run(), tiny_run_config(**LENGTH)
    validate = loop._Trainer._validate

    def signalled(self, *args):
        if self.stage.name == NAMES[stage] and self.state.step == self.stage.steps:
            os.kill(os.getpid(), signal.SIGTERM)
        validate(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "_validate", signalled)
        with pytest.raises(Interrupted) as stopped:
            train(config, out)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert ended(out, NAMES[stage])
    train(config, out)
    plain = make_run("plain")
    train(config, plain)
    assert_same_run(out, plain)


def test_a_signal_in_a_later_stage_saves_there(tiny_run_config, make_run, monkeypatch):
    config = tiny_run_config(**LENGTH)
    whole, out = make_run("whole"), make_run("stopped")
    train(config, whole)
    with monkeypatch.context() as patch:
        at_step(patch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted) as stopped:
            train(config, out)
    assert stopped.value.code == 143
    assert stopped.value.message == f"stopped after step 2 of extend-1, saved in {out}"
    assert [path.name for path in committed(out / "checkpoints" / "extend-1")] == ["step-2"]
    train(config, out)
    assert [path.name for path in committed(out / "checkpoints" / "extend-1")] == ["step-4", "step-6"]
    left, right = course(out), course(whole)
    assert left == right
    assert ended(out, "extend-2").state == ended(whole, "extend-2").state


def test_rolling_back_before_a_stages_first_checkpoint_goes_to_its_beginning(tiny_run_config, make_run, monkeypatch):
    """Twenty steps into a phase without a checkpoint, a spike leads back to the weights of pretraining."""
    out = make_run()
    config = tiny_run_config(
        steps=8, checkpoint_every=100, validate_every=100, on_spike="roll_back", extend=[{**PHASES[0], "steps": 24}]
    )
    real, seen = loop.train_step, []

    def step(objective, optimizer, batch, *args, **kwargs):
        seen.append({name: tensor.clone() for name, tensor in objective.model.state_dict().items()})
        if len(seen) != 8 + 20:
            return real(objective, optimizer, batch, *args, **kwargs)
        handle = objective.model.transformer.norm.register_forward_hook(lambda module, inputs, out: out * 300.0)
        try:
            return real(objective, optimizer, batch, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(loop, "train_step", step)
    train(config, out)
    begun, again = seen[8], seen[8 + 20]
    assert len(seen) == 8 + 20 + 24
    assert all(torch.equal(again[name], tensor) for name, tensor in begun.items())
    assert all(torch.equal(ended(out, "pretrain").tensors["model"][name], tensor) for name, tensor in begun.items())
    rows = read_metrics(out / "metrics.jsonl")
    (event,) = [row for row in rows if "event" in row]
    assert (event["stage"], event["step"], event["rolled_back_from"]) == ("extend-1", 1, 20)
    expected = [("pretrain", n) for n in range(1, 9)] + [("extend-1", n) for n in range(1, 25)]
    assert [(row["stage"], row["step"]) for row in rows if "loss" in row] == expected


@pytest.mark.parametrize(("extend", "complaint"), [
    ([PHASES[0], {**PHASES[1], "steps": 6}], r"train.extend.1.steps: saved 5, given 6"),
    ([PHASES[0], {**PHASES[1], "sequence_length": 96}], r"train.extend.1.sequence_length: saved 128, given 96"),
    ([PHASES[0]], r"train.extend.1.steps: saved 5, given None"),
    ([], r"train.extend.0.steps: saved 6, given None"),
])  # fmt: skip
def test_other_phases_are_refused_with_the_difference(tiny_run_config, make_run, monkeypatch, extend, complaint):
    out = make_run()
    at_step(monkeypatch, 13, kill)
    with pytest.raises(Killed):
        train(tiny_run_config(**LENGTH), out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=complaint) as refused:
        train(tiny_run_config(**{**LENGTH, "extend": extend}), out)
    assert "\n" not in str(refused.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_damaged_end_of_the_stage_before_is_refused(tiny_run_config, make_run, monkeypatch):
    out = make_run()
    at_step(monkeypatch, 9, kill)
    with pytest.raises(Killed):
        train(tiny_run_config(**LENGTH), out)
    path = out / "checkpoints" / "pretrain" / "step-8" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"step-8/model.safetensors: damaged.*to resume from step-4"):
        train(tiny_run_config(**LENGTH), out)


def test_going_back_to_an_older_checkpoint_of_a_stage_repeats_the_later_ones(tiny_run_config, make_run):
    config = tiny_run_config(**LENGTH)
    whole, out = make_run("whole"), make_run("again")
    for run in (whole, out):
        train(config, run)
    for gone in ("extend-2", "extend-1/step-6"):
        shutil.rmtree(out / "checkpoints" / gone)
    train(config, out)
    assert_same_run(out, whole)


@pytest.mark.parametrize(("span", "steps"), [(0.25, 4), (0.1, 1000), (1.0, 7)])
def test_a_span_of_the_run_is_a_decay_of_a_step(span, steps):
    assert ema_decay(span, steps) ** (span * steps) == pytest.approx(math.exp(-1))


def test_an_average_by_its_span(tiny_run_config, make_run):
    spanned, decayed = make_run("spanned"), make_run("decayed")
    found = train(tiny_run_config(steps=10, ema_span=0.2), spanned)
    assert (found.config.train.ema_span, found.config.train.ema_decay) == (None, math.exp(-1 / 2))
    train(tiny_run_config(steps=10, ema_decay=math.exp(-1 / 2)), decayed)
    left, right = (ended(out, "pretrain").tensors["average"] for out in (spanned, decayed))
    assert all(torch.equal(left[name], right[name]) for name in right)
