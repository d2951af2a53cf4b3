"""What a dry run says of each rank, against ranks that are really there: bytes held, kept and sent."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from processes import run_processes
from torch.distributed.fsdp import FSDPModule

from benthic.config.schema import RunConfig
from benthic.data.batches import Batch
from benthic.parallel.group import Group
from benthic.parallel.local import is_divided, local
from benthic.precision import weight_copies
from benthic.precision.compute import Compute
from benthic.precision.fp8 import quantise
from benthic.precision.weight_copies import WeightCopies
from benthic.train.compute import compute_in
from benthic.train.dry_run import Memory, Messages, dry_run, held_by
from benthic.train.objective import prediction_targets
from benthic.train.schedule import StepSettings
from benthic.train.state import TrainState
from benthic.train.step import accumulate_gradients, train_step
from tests.support.counted import counted
from tests.support.kept import kept_bytes
from tests.support.spread import Rows, settings, spread_over

STEP = StepSettings(0, 8, 1.0, 0.001, 0.3, 1e-4)


class Watched(Group):
    """Also looks at what a rank holds when a pass begins."""

    weights = 0
    gradients = 0

    def begin_pass(self, objective: Any, *, last: bool) -> None:
        if last:
            self.weights = sum(weight.nbytes for weight, _ in _whole(objective))
            self.gradients = sum(gradient.nbytes for _, gradient in _whole(objective) if gradient is not None)
            self.gradients += sum(p.grad.nbytes for p in _never_gathered(objective) if p.grad is not None)
        super().begin_pass(objective, last=last)


def _whole(objective: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Gathered weights with their gradients."""
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for weight in group.fsdp_params:
                    if weight.sharded_state.name == "UNSHARDED":
                        unsharded = weight._unsharded_param
                        grad = unsharded.grad
                        yield unsharded, weight.unsharded_accumulated_grad if grad is None else grad


def _never_gathered(objective: Any) -> set[torch.Tensor]:
    gathered = {weight for weight, _ in _whole(objective)}
    return {p for p in objective.parameters() if p not in gathered and not is_divided(p)}


def observe(rank: int, configs: list[RunConfig]) -> list[dict[str, Any]]:
    """One rank's part of several runs, of a step each."""
    return [_observe(config) for config in configs]


def _observe(config: RunConfig) -> dict[str, Any]:
    world, train, compute = Watched(config.parallel), config.train, config.precision.compute
    state, rows = TrainState(config, world=world), Rows(config)
    own = world.rows(train.batch_size, train.micro_batch_size)

    def step() -> None:
        report = train_step(
            state.objective, state.optimizer, rows.at(own.start, len(own)), STEP,
            micro_batch_size=train.micro_batch_size, compute=compute, world=world,
            gradients=lambda *arguments, **named: accumulate_gradients(*arguments, **named, world=world),
        )  # fmt: skip
        assert report.updated

    step()  # the first one of a pipeline also makes it
    world.figures()
    copies, made = [], []
    with counted() as sent, pytest.MonkeyPatch.context() as monkeypatch:
        close = WeightCopies.close

        def watched(of_step: WeightCopies) -> None:
            copies.append((of_step.nbytes, len(of_step._found)))
            close(of_step)

        monkeypatch.setattr(WeightCopies, "close", watched)
        monkeypatch.setattr(weight_copies, "quantise", lambda weight: made.append(weight) or quantise(weight))
        step()
    told = world.figures()["bytes_sent"]
    held = [local(p) for p in state.model.parameters()]
    optimizer = sum(tensor.nbytes for tensor in state.optimizer.state_tensors().values())
    return {
        "held": (sum(p.numel() for p in held), optimizer),
        "sent": dict(sent),
        "told": told,
        "copies": (*max(copies), len(made)),
        "weights": world.weights,
        "gradients": world.gradients,
        "kept": _kept(state, rows.at(own.start, train.micro_batch_size), compute) if world.layout.pipeline == 1 else 0,
    }


def _kept(state: TrainState, batch: Batch, compute: Compute) -> int:
    """Bytes of a pass's activations."""
    targets = prediction_targets(batch.tokens_BS, None, state.objective.predictions(STEP.mtp_weight))

    def forward() -> Any:
        return compute_in(compute, state.objective, batch.tokens_BS, None, targets)[:2]

    with pytest.MonkeyPatch.context() as monkeypatch:
        return kept_bytes(forward, monkeypatch, lambda: map(local, state.objective.parameters()))


def config_for(layout: dict[str, Any], compute: str = "fp32", recompute: bool = False, **model: int) -> RunConfig:
    """Tokens enough for routers that favour no expert to load them evenly."""
    sizes = {"batch_size": 8, "micro_batch_size": 1, "sequence_length": 128, "ema_decay": 0.0}
    whole = settings(compute=compute, model={"vocab_size": 50} | model, recompute=recompute, **sizes)
    return spread_over(whole, **layout)


LAYOUTS = {
    2: [{"expert": 2}, {"shard": 2}, {"replicate": 2}],
    4: [{"expert": 2, "shard": 2}, {"expert": 4}, {"shard": 2, "replicate": 2}, {"expert": 2, "replicate": 2}],
}
SOME = {
    2: [
        ({"expert": 2}, "fp32"),
        ({"expert": 2}, "bf16"),
        ({"replicate": 2, "zero": 2}, "fp32"),
        ({"shard": 2, "zero": 3}, "fp8"),
    ],
    4: [({"expert": 2, "shard": 2, "zero": 3}, "bf16"), ({"expert": 2, "shard": 2, "fp8_dispatch": True}, "fp8")],
}


@pytest.mark.parametrize("world", SOME)
def test_ranks_hold_keep_and_send_what_was_said(world):
    compare(world, [config_for(layout, compute, recompute=True) for layout, compute in SOME[world]])


@pytest.mark.slow
@pytest.mark.parametrize("world", LAYOUTS)
@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp8"])
def test_all_layouts(world, compute):
    layouts = [layout | {"zero": zero} for layout in LAYOUTS[world] for zero in (1, 2, 3)]
    compare(world, [config_for(layout, compute) for layout in layouts])


def compare(world: int, configs: list[RunConfig]) -> None:
    by_rank = run_processes(observe, world, configs, timeout=250.0)
    for number, config in enumerate(configs):
        found = [outcomes[number] for outcomes in by_rank]
        run = dry_run(config, fused=True)
        assert [one["held"] for one in found] == [held_by(config, rank) for rank in range(world)]
        compare_sent(run.stages[0].messages, found)
        memory = run.stages[0].memory
        kept = sum(one["kept"] for one in found) / world
        # Rounded weights of experts that are not gathered are copies of a pass; FP8 ones are the step's.
        copies = memory.copies if config.precision.compute == "bf16" else 0
        assert kept == pytest.approx(memory.activations + copies, rel=0.03)
        if config.precision.compute == "fp8":
            compare_copies(memory, found)
        if config.parallel.zero == 1:
            assert {one["weights"] for one in found} == {memory.gathered}
            assert {one["gradients"] for one in found} == {memory.gradients}


def compare_copies(memory: Memory, found: list[dict[str, Any]]) -> None:
    """FP8 copies of weights: all passes of a step share those made once."""
    for one in found:
        held, weights, made = one["copies"]
        assert held == memory.copies
        assert made == weights > 0


def compare_sent(messages: Messages, found: list[dict[str, Any]]) -> None:
    """What depends on sizes alone to the byte, what depends on routers within 5%."""
    for one in found:
        assert one["sent"].get("all_gather", 0) == messages.weights == one["told"].get("weights", 0)
        assert one["sent"].get("reduce_scatter", 0) == messages.gradients == one["told"].get("gradients", 0)
        assert messages.copies == one["told"].get("copies", 0)
        # Losses, loads and the like besides.
        assert 0 <= one["sent"]["all_reduce"] - messages.copies < 2000
    exchanged = messages.dispatch + messages.combine + messages.counts
    mean = sum(one["sent"].get("all_to_all", 0) for one in found) / len(found)
    assert mean == pytest.approx(exchanged, rel=0.05)
    for kind in ("dispatch", "combine", "counts"):
        told = sum(one["told"].get(kind, 0) for one in found) / len(found)
        assert told == pytest.approx(getattr(messages, kind), rel=0.05)


@pytest.mark.parametrize(("world", "others"), [(2, {}), (4, {"shard": 2}), (4, {"expert": 2})])
def test_pipelines_hold_and_send_what_was_said(world, others):
    layouts = [others | {"pipeline": 2, "schedule": schedule} for schedule in ("1f1b", "dualpipev")]
    configs = [config_for(layout, num_hidden_layers=4) for layout in layouts]
    compare_pipelines(world, [*configs, config_for(layouts[-1], "fp8", num_hidden_layers=4)])


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_longer_pipelines(compute):
    schedules = ("1f1b", "interleaved", "zbv", "dualpipev")
    layouts = [{"pipeline": 4, "schedule": schedule} for schedule in schedules]
    compare_pipelines(4, [config_for(layout, compute, num_hidden_layers=6) for layout in layouts])


def compare_pipelines(world: int, configs: list[RunConfig]) -> None:
    by_rank = run_processes(observe, world, configs, timeout=250.0)
    for number, config in enumerate(configs):
        run = dry_run(config)
        for stage in run.stages:
            found = [by_rank[rank][number] for rank in stage.ranks]
            assert [one["held"] for one in found] == [held_by(config, rank) for rank in stage.ranks]
            compare_sent(stage.messages, found)
            if config.precision.compute == "fp8":
                compare_copies(stage.memory, found)
            for one in found:
                assert one["sent"]["point_to_point"] == stage.messages.pipeline + stage.messages.embedding
