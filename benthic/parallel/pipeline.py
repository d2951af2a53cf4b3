"""A model whose layers lie on several ranks: cut into stages, through which its micro-batches go."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from benthic.model import LanguageModel
from benthic.parallel.cut import Costs, computed_costs, cut, cut_in_v, stages_of
from benthic.parallel.local import local
from benthic.parallel.runtime import Call, Part, Runner, TorchStage
from benthic.parallel.schedules import forward_orders, orders
from benthic.parallel.stage_ranks import KINDS, Schedule, ranks_of_stages, stages_of_rank
from benthic.parallel.stages import EMBEDDING, PIPELINE, AnyStage, MicroBatch, drop_other_stages, make_stages
from benthic.parallel.turns import Turns


class Pipeline:
    """The stages that this rank holds, of a model whose other stages the other ranks of ``group`` hold.

    Args:
        copying_rank: has a copy of the first rank's embedding; 0 if none has.
        turns: which passes that the schedule pairs take; by default one follows the other.
    """

    def __init__(
        self,
        stages: Mapping[int, AnyStage],
        schedule: Schedule,
        group: ProcessGroup,
        copying_rank: int = 0,
        turns: Turns | None = None,
    ) -> None:
        self._schedule, self._group, self._copying_rank = schedule, group, copying_rank
        self._turns = turns
        self._parts = {number: Part(stage) for number, stage in stages.items()}
        self._runners: dict[tuple[int, bool], Runner] = {}

    def backward(self, micro_batches: Sequence[MicroBatch], call: Call, dtype: torch.dtype) -> None:
        """Adds the gradients of the micro-batches' losses to those of this rank's parameters.

        Every rank gives the same micro-batches; ``call`` runs a stage, whose states are of this dtype.
        """
        self._run(micro_batches, call, dtype, learn=True)

    def add_up_copies(self, embedding: nn.Module) -> None:
        """Sums the embedding's gradient with that of its copy, on both ranks that have one.

        Called on all ranks once the gradients are there; a copy has none in a step without MTP.
        """
        rank, last = self._group.rank(), self._copying_rank
        if not last or rank not in (0, last):
            return
        weight = embedding.get_parameter("weight")
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        grad = local(weight.grad)
        if rank:
            dist.send(grad, group=self._group, group_dst=0)
            dist.recv(grad, group=self._group, group_src=0)
        else:
            other = torch.empty_like(grad)
            dist.recv(other, group=self._group, group_src=last)
            grad += other
            dist.send(grad, group=self._group, group_dst=last)

    def total(self, numbers: Tensor) -> Tensor:
        """Their sum over all stages."""
        total = numbers.clone()
        dist.all_reduce(total, group=self._group)
        return total

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[MicroBatch], call: Call, dtype: torch.dtype) -> None:
        """Shows the micro-batches to all stages, without gradients."""
        self._run(micro_batches, call, dtype, learn=False)

    def _run(self, micro_batches: Sequence[MicroBatch], call: Call, dtype: torch.dtype, *, learn: bool) -> None:
        for part in self._parts.values():
            part.call = call
        key = len(micro_batches), learn
        if key not in self._runners:
            self._runners[key] = self._runner(*key)
        self._runners[key].run(micro_batches, dtype)

    def _runner(self, micro_batches: int, learn: bool) -> "Runner":
        ranks = self._group.size()
        ranks_of = ranks_of_stages(self._schedule, ranks)
        stages = [TorchStage(part, number, len(ranks_of), self._group) for number, part in self._parts.items()]
        make = orders if learn else forward_orders
        made = make(self._schedule, ranks, micro_batches)
        return Runner(stages, micro_batches, made, ranks_of, self._turns, learn=learn)


def divide_layers(
    objective: nn.Module,
    schedule: Schedule,
    group: ProcessGroup,
    *,
    length: int,
    counts: Sequence[int] | None = None,
    turns: Turns | None = None,
) -> None:
    """Keep this rank's stages of the model in an objective, and let its steps go through the pipeline.

    Args:
        length: of the sequences, by which the cost of attention is told.
        counts: layers of each stage; by default as that cost has it.
        turns: as for :class:`Pipeline`.

    Raises:
        InputError: the model has too few layers.
    """
    model = next(part for part in objective.modules() if isinstance(part, LanguageModel))
    costs = computed_costs(model.config, length, mtp=len(model.mtp) > 0)
    layers = layers_of_stages(costs, schedule, group.size(), counts)
    held = make_stages(model, layers, stages_of_rank(schedule, group.size(), group.rank()))
    drop_other_stages(model, held)
    copying_rank = ranks_of_stages(schedule, group.size())[-1] if len(model.mtp) else 0
    model.__dict__[PIPELINE] = Pipeline(held, schedule, group, copying_rank, turns)
    if copying_rank == group.rank() != 0:
        model.copies = frozenset([EMBEDDING])


def layers_of_stages(costs: Costs, schedule: Schedule, ranks: int, counts: Sequence[int] | None = None) -> list[range]:
    """The layers of each stage of a pipeline of so many ranks, by their cost or as many as ``counts`` says.

    Raises InputError if there are too few.
    """
    if counts is not None:
        return stages_of(counts)
    kind = KINDS[schedule]
    return (cut_in_v if kind.v_shaped else cut)(costs, ranks * kind.stages_per_rank)
