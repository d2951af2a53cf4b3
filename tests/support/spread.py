"""A short training, by one process or spread over several, with everything that a step may have."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benthic.config.schema import RunConfig
from benthic.data.batches import Batch
from benthic.model import LanguageModel
from benthic.model.language_model import cast_parameters
from benthic.parallel.group import Group
from benthic.parallel.world import ALONE, World
from benthic.plan.flops import training_flops
from benthic.train.schedule import Course
from benthic.train.state import TrainState
from benthic.train.step import accumulate_gradients, train_step

MODEL = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "first_k_dense_replace": 1, "intermediate_size": 40,
    "num_attention_heads": 2, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "n_routed_experts": 8, "moe_intermediate_size": 12, "n_shared_experts": 1,
    "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1, "initializer_range": 0.1,
}  # fmt: skip


def settings(steps: int = 20, model: Any = None, compute: str = "fp32", **train: Any) -> RunConfig:
    """Sizes of some odd kind, a ramp of the batch, an average, and clipping that bites; keywords go to ``train``."""
    usual = {
        "steps": steps, "batch_size": 8, "micro_batch_size": 1, "sequence_length": 16, "ema_decay": 0.9,
        "optimizer": {"learning_rate": 1e-3, "clip_norm": 0.5},
        "schedule": {"batch_ramp": 0.5, "batch_ramp_start": 0.4, "balance_loss_weight": 0.01,
                     "bias_update_speed": 0.01},
    }  # fmt: skip
    return RunConfig.model_validate(
        {"model": MODEL | (model or {}), "train": usual | train, "precision": {"compute": compute}}
    )


class InFloat64:
    """The usual model with weights in float64."""

    def build(self, config):
        model = LanguageModel(config)
        cast_parameters(model, torch.float64)
        return model

    def training_flops(self, config, length, *, mtp):
        return training_flops(config, length, mtp=mtp)

    def settings(self):
        return {}


class InFloat32(InFloat64):
    """The usual model."""

    def build(self, config):
        return LanguageModel(config)


class Outcome(NamedTuple):
    """Numbers of every step, and all tensors at the end, on the main process."""

    losses: list[list[float]]
    """Cross-entropies, balance loss and gradient norm."""
    loads: list[list[list[int]]]
    tensors: dict[str, torch.Tensor]
    sent: list[dict[str, int]]
    """Bytes in every step."""


class Rows:
    """Random sequences, each by its number."""

    def __init__(self, config: RunConfig) -> None:
        self._vocab_size = config.model.vocab_size
        self._length = config.train.sequence_length + 1 + config.model.num_nextn_predict_layers

    def at(self, index: int, count: int) -> Batch:
        rows = torch.empty(count, self._length, dtype=torch.long)
        documents = torch.empty_like(rows)
        for number in range(count):
            generator = torch.Generator().manual_seed(index + number)
            rows[number] = torch.randint(self._vocab_size, (self._length,), generator=generator)
            documents[number] = torch.rand(self._length, generator=generator).lt(0.1).cumsum(0)
        return Batch(rows, documents)


def take_steps(config: RunConfig, world: World, architecture: Any) -> Outcome:
    """All steps of a run."""
    train = config.train
    micro_batch = train.micro_batch_size or train.batch_size
    course = Course(train.schedule, train.steps, train.batch_size, train.micro_batch_size or 1)
    state, rows = TrainState(config, architecture, world=world), Rows(config)

    def gradients(*arguments: Any, **options: Any) -> Any:
        return accumulate_gradients(*arguments, **options, world=world)

    losses, loads, sent = [], [], []
    for step in range(train.steps):
        now = course.at(step)
        own = world.rows(now.batch_size, micro_batch)
        report = train_step(
            state.objective, state.optimizer, rows.at(now.first_sequence + own.start, len(own)), now,
            micro_batch_size=micro_batch, compute=config.precision.compute, health=state.health, gradients=gradients,
            world=world,
        )  # fmt: skip
        assert report.updated
        assert report.incident is None
        if state.average is not None:
            state.average.update()
        losses.append([*report.cross_entropy, report.balance, report.grad_norm])
        loads.append(report.load_ME.tolist())
        sent.append(world.figures().get("bytes_sent", {}))
        state.step += 1
    groups = world.whole(state.model, state.to_checkpoint({}, on_schedule=True).tensors)
    tensors = {f"{group}: {name}": t.detach().clone() for group, named in groups.items() for name, t in named.items()}
    return Outcome(losses, loads, tensors, sent)


def spread_steps(rank: int, config: RunConfig, architecture: Any) -> Outcome | None:
    """The same by the processes of a group, as ``config.parallel`` has it."""
    assert dist.is_initialized()
    outcome = take_steps(config, Group(config.parallel), architecture)
    return outcome if rank == 0 else None


def spread_over(config: RunConfig, **parallel: Any) -> RunConfig:
    """The same settings on a layout."""
    return RunConfig.model_validate(config.model_dump(mode="json") | {"parallel": parallel})


def largest_difference(one: Outcome, other: Outcome, *, norms: bool = True, moments: bool = True) -> float:
    """Of any loss in any step, any gradient norm, and any number in any tensor, the optimizer's ``moments`` too.

    The balance loss, in fp32 always, is left to others.
    """
    assert one.tensors.keys() == other.tensors.keys()
    left, right = (
        torch.tensor(
            [number for row in run.losses for number in (*row[:-2], *(row[-1:] if norms else []))], dtype=torch.float64
        )
        for run in (one, other)
    )
    tensors = [
        (one.tensors[name] - tensor).abs().max().item()
        for name, tensor in other.tensors.items()
        if moments or not name.startswith("optimizer: ")
    ]
    return max((left - right).abs().max().item(), *tensors)


__all__ = [
    "ALONE", "InFloat32", "InFloat64", "Outcome", "Rows", "largest_difference", "settings", "spread_over",
    "spread_steps", "take_steps",
]  # fmt: skip
