"""A job of any size, built on devices that are not there: what each rank of it would hold and send.

The model is made of tensors without memory, cut into stages and divided among ranks by the code that real runs use
(``benthic/parallel``); formulas (``benthic/plan``) add what only running would show: activations, and messages. Ranks
of a stage hold alike, but for the last rows of weights that do not divide evenly, so the first stands for all: it has
the most of each.
"""

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from benthic.config.schema import RunConfig
from benthic.model import LanguageModel, build_model
from benthic.model.moe import Experts, MoE, Router
from benthic.parallel.cut import computed_costs, cut
from benthic.parallel.fits import refuse_misfit
from benthic.parallel.gather import Divided, rows_held
from benthic.parallel.in_flight import InFlight, most_in_flight
from benthic.parallel.layout import Layout, passes_of_ranks
from benthic.parallel.pipeline import layers_of_stages
from benthic.parallel.schedules import Action, Orders, orders
from benthic.parallel.shard import units
from benthic.parallel.stage_ranks import ranks_of_stages
from benthic.parallel.stages import drop_other_stages, make_stages
from benthic.parallel.timeline import Times, idle_share, simulate
from benthic.plan.activations import Arithmetic, block_bytes, fp8_bytes, head_bytes, mtp_bytes
from benthic.plan.states import StateMemory, Unit, state_memory, state_messages
from benthic.plan.traffic import Visits, token_messages, visits
from benthic.precision.blocks import block_grid
from benthic.train.compute import moments_dtype
from benthic.train.objective import Objective
from benthic.train.optimizer import hidden_matrices
from benthic.train.trial import heaviest_mtp

_Module = TypeVar("_Module", bound=nn.Module)
_EXACT = 4
_COUNTS = 16
"""Bytes that tell a rank how much it is going to be sent."""


@dataclass(frozen=True)
class Memory(StateMemory):
    """Bytes of one rank at its fullest."""

    activations: int
    """Of all micro-batches in flight."""
    copies: int
    """Of weights in fewer bits: in bf16 each micro-batch in flight has its own, in FP8 all of a step share them."""

    @property
    def total(self) -> int:
        """All together; what libraries and the allocator take is not known."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Messages:
    """Bytes that one rank sends in a step."""

    dispatch: int
    """Tokens to experts, and gradients of what experts made of them."""
    combine: int
    """What experts made of them, and gradients of tokens."""
    counts: int
    """Which tokens are for which experts."""
    pipeline: int
    """States to the next stage, and their gradients to the one before."""
    gradients: int
    """To those that update the weights."""
    copies: int
    """Summing gradients over copies of the model."""
    weights: int
    """To those that use them."""
    embedding: int
    """Gradients of the embedding, where a second rank embeds for MTP modules."""

    @property
    def total(self) -> int:
        """All together; losses and loads, which are small, are left out."""
        return sum(vars(self).values())


class Held(NamedTuple):
    """Parts of weights that a rank has, and updates."""

    parameters: int
    optimizer_bytes: int


@dataclass(frozen=True)
class StageRanks:
    """The ranks of one place of the pipeline."""

    pipeline: int
    ranks: range
    layers: tuple[range, ...]
    """Of each stage that is here."""
    embeds: bool
    predicts: bool
    """Whether head and MTP modules are here."""
    parameters: int
    """On the rank with most."""
    parameters_least: int
    in_flight: dict[int, int]
    """Micro-batches by stage, when the rank holds most."""
    memory: Memory
    messages: Messages


@dataclass(frozen=True)
class DryRun:
    """A job as it would be."""

    processes: int
    total_parameters: int
    """MTP modules included."""
    compute: str
    passes: int
    """Micro-batches of each rank in a step."""
    rows: int
    """Sequences of each."""
    bubble_share: float
    """Of the time from a step's first forward pass to its last backward pass: in it a rank waits for other stages."""
    visits: Visits | None
    """Of tokens, where experts are divided."""
    stages: tuple[StageRanks, ...]

    @property
    def fullest(self) -> StageRanks:
        """Where most memory is needed."""
        return max(self.stages, key=lambda stage: stage.memory.total)


def dry_run(config: RunConfig, *, fused: bool = False, strict: bool = True) -> DryRun:
    """What training with these settings needs of each rank.

    Args:
        config: of one stage of training; ``precision.compute=auto`` counts as bf16.
        fused: whether Benthic's own kernels compute, as on CPUs, or PyTorch's operations, as on GPUs.
        strict: refuse what a run would refuse; otherwise ranks without sequences of their own wait for the others.

    Raises:
        InputError: the settings of ``parallel`` do not fit each other, the model or the batch.
    """
    if strict:
        refuse_misfit(config, config.parallel.processes)
    return _Job(config, fused=fused).run()


def held_by(config: RunConfig, rank: int) -> Held:
    """What one rank has of weights and optimizer state. Raises as :func:`dry_run`."""
    refuse_misfit(config, config.parallel.processes)
    job = _Job(config, fused=False)
    return _held(_Place(job, rank // job.layout.data_ranks).units(rank))


def _held(found: Iterable[Unit]) -> Held:
    return Held(*(sum(numbers) for numbers in zip(*((unit.held, unit.optimizer_bytes) for unit in found), strict=True)))


class _Job:
    """What is the same on all ranks."""

    def __init__(self, config: RunConfig, *, fused: bool) -> None:
        self.config, self.model, self.parallel = config, config.model, config.parallel
        self.layout = Layout.of(config.parallel)
        compute = config.precision.compute
        self.arithmetic = Arithmetic("bf16" if compute == "auto" else compute, config.train.recompute, fused)
        train = config.train
        self.rows = min(train.micro_batch_size or train.batch_size, max(1, train.batch_size // self.layout.data_ranks))
        self.passes = passes_of_ranks(train.batch_size, self.layout.data_ranks, self.rows)
        self.depths = self.model.num_nextn_predict_layers if heaviest_mtp(config) else 0
        schedule, pipeline = self.parallel.schedule, self.layout.pipeline
        self.ranks_of = ranks_of_stages(schedule, pipeline) if pipeline > 1 else [0]
        self.costs = computed_costs(self.model, train.sequence_length, mtp=self.model.num_nextn_predict_layers > 0)
        given = self.parallel.layers
        self.layers = layers_of_stages(self.costs, schedule, pipeline, given) if pipeline > 1 else cut(self.costs, 1)

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.config.train.sequence_length

    @cached_property
    def whole(self) -> LanguageModel:
        """The model before it is cut."""
        return build_model(self.model, device="meta")

    @cached_property
    def visits(self) -> Visits | None:
        """Of tokens to experts on other ranks."""
        return visits(self.model, self.layout.expert) if self.layout.expert > 1 else None

    @cached_property
    def orders(self) -> Orders:
        """What each rank computes."""
        if self.layout.pipeline > 1:
            return orders(self.parallel.schedule, self.layout.pipeline, self.passes)
        return orders("1f1b", 1, self.passes)

    def _bubble_share(self) -> float:
        """Passes take as long as they have operations, sending takes no time."""
        if self.layout.pipeline == 1:
            return 0.0
        durations = _Durations()
        durations.stages = [sum(self.costs.layers[layer] for layer in layers) for layers in self.layers]
        durations.stages[0] += self.costs.first
        durations.stages[-1] += self.costs.last
        return idle_share(simulate(self.orders, len(self.layers), durations))

    def run(self) -> DryRun:
        """Every place of the pipeline."""
        stages = tuple(_Place(self, place).ranks() for place in range(self.layout.pipeline))
        return DryRun(
            processes=self.layout.world,
            total_parameters=sum(p.numel() for p in self.whole.parameters()),
            compute=self.arithmetic.compute,
            passes=self.passes,
            rows=self.rows,
            bubble_share=self._bubble_share(),
            visits=self.visits,
            stages=stages,
        )


class _Durations(Times):
    """Of passes through stages that differ in what they compute."""

    stages: list[float]

    def of(self, action: Action) -> float:
        """As long as it takes to compute."""
        return self.stages[action.stage_index] * super().of(action)


def _twin(model: LanguageModel) -> LanguageModel:
    """The same layers in containers of their own, so that what is dropped from one stays in the other."""
    twin = _container(model)
    twin.transformer, twin.mtp = _container(model.transformer), _container(model.mtp)
    twin.transformer.layers = _container(model.transformer.layers)
    return twin


def _container(module: _Module) -> _Module:
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module.__dict__["_modules"])
    return twin


class _Place:
    """One place of the pipeline: the stages held there, on devices that are not there."""

    def __init__(self, job: _Job, place: int) -> None:
        self.job, self.place = job, place
        self.held = [stage for stage, rank in enumerate(job.ranks_of) if rank == place]
        self.last = len(job.ranks_of) - 1
        model = _twin(job.whole)
        drop_other_stages(model, make_stages(model, job.layers, self.held))
        self.model, self.objective = model, Objective(model)
        muon = job.config.train.optimizer.name == "muon"
        self.matrices = set(hidden_matrices(model)) if muon else set[Tensor]()

    def ranks(self) -> StageRanks:
        job, layout = self.job, self.job.layout
        found = list(self.units(rank=self.place * layout.data_ranks))
        least = self.units(rank=(self.place + 1) * layout.data_ranks - 1)
        flight, memory = self._memory(found)
        return StageRanks(
            pipeline=self.place,
            ranks=range(self.place * layout.data_ranks, (self.place + 1) * layout.data_ranks),
            layers=tuple(job.layers[stage] for stage in self.held),
            embeds=0 in self.held,
            predicts=self.last in self.held,
            parameters=_held(found).parameters,
            parameters_least=_held(least).parameters,
            in_flight=flight.micro_batches,
            memory=memory,
            messages=self._messages(found),
        )

    def units(self, rank: int) -> Iterator[Unit]:
        """As :func:`benthic.parallel.shard.shard` divides them."""
        layout, compute = self.job.layout, self.job.arithmetic.compute
        own = {p for part in self.objective.modules() if isinstance(part, Experts) for p in part.parameters()}
        seen: set[Tensor] = set()
        for part in units(self.objective, experts=True, routers=compute == "bf16"):
            weights = [p for p in part.parameters() if p not in seen]
            seen.update(weights)
            if not weights:
                continue
            expert = weights[0] in own
            first, here = (
                [self._numel(p, expert, number) for p in weights] for number in (self.place * layout.data_ranks, rank)
            )
            ranks = layout.shard * (1 if expert else layout.expert)
            number = 2 if compute == "bf16" and not isinstance(part, Router) else _EXACT
            yield Unit(
                whole=sum(p.numel() for p in weights) // (layout.expert if expert else 1),
                held=sum(here),
                optimizer_bytes=sum(self._optimizer_bytes(p, held) for p, held in zip(weights, here, strict=True)),
                padded=sum(first) * ranks,
                ranks=ranks,
                copies=layout.replicate,
                gathered_bytes=number if self._is_divided(expert) else 0,
                stays=part is self.objective,
            )

    def _is_divided(self, expert: bool) -> bool:
        """Whether weights go through FSDP2, be it to one rank of a shard and its copies."""
        layout = self.job.layout
        return layout.shard * layout.replicate > 1 if expert else layout.data_ranks > 1

    def _numel(self, weight: Tensor, expert: bool, rank: int) -> int:
        """Elements that a rank holds."""
        rows = rows_held(Divided(len(weight), expert), self.job.layout, rank)
        return len(rows) * (weight.numel() // len(weight))

    def _optimizer_bytes(self, weight: Tensor, held: int) -> int:
        """Muon has one moment; AdamW has two, and counts the updates of each weight."""
        if weight in self.matrices:
            return held * _EXACT
        return 2 * held * moments_dtype(self.job.arithmetic.compute).itemsize + _EXACT

    def _memory(self, found: list[Unit]) -> tuple[InFlight, Memory]:
        job, train = self.job, self.job.config.train
        states = state_memory(found, zero=job.parallel.zero, average=bool(train.ema_decay or train.ema_span))
        order = job.orders[self.place]
        activations = most_in_flight(order, {stage: self._kept(stage) for stage in self.held})
        copied = {stage: self._copied(stage) for stage in self.held}
        shared = self.job.arithmetic.compute == "fp8"
        copies = sum(copied.values()) if shared else most_in_flight(order, copied).bytes
        memory = Memory(**asdict(states), activations=round(activations.bytes), copies=round(copies))
        return activations, memory

    def _kept(self, stage: int) -> float:
        """Bytes of a micro-batch's activations in a stage."""
        job = self.job
        config, arithmetic, tokens = job.model, job.arithmetic, job.tokens
        messages = job.visits.messages if job.visits else None
        dense = sum(layer < config.first_k_dense_replace for layer in job.layers[stage])
        sparse = len(job.layers[stage]) - dense
        kept = dense * block_bytes(config, arithmetic, dense=True)
        kept += sparse * block_bytes(config, arithmetic, dense=False, messages=messages)
        if stage < self.last:  # what it hands on
            return tokens * (kept + config.hidden_size * arithmetic.number)
        kept += job.depths * mtp_bytes(config, arithmetic, messages=messages)
        return tokens * kept + head_bytes(config, arithmetic, tokens, 1 + job.depths)

    def _copied(self, stage: int) -> float:
        """Bytes of weights in fewer bits that a micro-batch keeps for its backward pass through a stage."""
        return sum(map(self._copied_of, self._modules(stage)))

    def _copied_of(self, part: nn.Module) -> float:
        job = self.job
        expert = isinstance(part, Experts)
        weights, ranks = list(part.parameters(recurse=False)), job.layout.expert if expert else 1
        if job.arithmetic.compute == "fp8":
            linear = isinstance(part, nn.Linear) and part is not self.model.transformer.head
            return sum(p.numel() + _EXACT * math.prod(block_grid(p.shape)) for p in weights if expert or linear) / ranks
        rounded = job.arithmetic.compute == "bf16" and not self._is_divided(expert) and not isinstance(part, Router)
        return 2 * sum(p.numel() for p in weights if rounded) / ranks

    def _modules(self, stage: int) -> Iterator[nn.Module]:
        """Everything that computes in a stage."""
        model = self.model
        for layer in self.job.layers[stage]:
            yield from model.transformer.layers[layer].modules()
        if stage == 0:
            yield model.transformer.embed
        if stage == self.last:
            for module in (model.transformer.norm, model.transformer.head, model.mtp):
                yield from module.modules()

    def _messages(self, found: list[Unit]) -> Messages:
        job = self.job
        states = state_messages(found, zero=job.parallel.zero, passes=job.passes)
        tokens = self._token_messages()
        return Messages(
            **{kind: round(size) for kind, size in (*tokens.items(), *states._asdict().items())},
            pipeline=self._pipeline_bytes(),
            embedding=self._embedding_bytes(),
        )

    def _token_messages(self) -> dict[str, float]:
        job = self.job
        if job.visits is None:
            return {"dispatch": 0, "combine": 0, "counts": 0}
        width, number = job.model.hidden_size, job.arithmetic.number
        dispatched = fp8_bytes(width) if job.parallel.fp8_dispatch else width * number
        of_one = token_messages(job.visits.messages, job.visits.pairs, width * number, dispatched)
        layers = sum(isinstance(part, MoE) for stage in self.held for part in self._modules(stage))
        found = {kind: size * layers * job.passes * job.tokens for kind, size in of_one._asdict().items()}
        found["counts"] += layers * job.passes * _COUNTS * (job.layout.expert - 1)
        return found

    def _pipeline_bytes(self) -> int:
        """Stages that follow one another on one rank need not send."""
        job = self.job
        states = job.tokens * job.model.hidden_size * job.arithmetic.number * job.passes
        neighbours = [other for stage in self.held for other in (stage - 1, stage + 1) if 0 <= other <= self.last]
        return states * sum(job.ranks_of[other] != self.place for other in neighbours)

    def _embedding_bytes(self) -> int:
        """The first and the last rank send each other what they hold of the gradient."""
        job = self.job
        ends = 0 in self.held or self.last in self.held
        copied = job.model.num_nextn_predict_layers and job.ranks_of[-1] != 0 and ends
        weight = job.whole.transformer.embed.weight
        return self._numel(weight, False, self.place * job.layout.data_ranks) * _EXACT if copied else 0
