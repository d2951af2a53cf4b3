"""What the parts of a model cost here, measured, and where that says to cut it into pipeline stages."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benthic.config.schema import ModelConfig, RunConfig
from benthic.errors import InputError
from benthic.model import Routing, build_model
from benthic.parallel.cut import Costs, computed_costs, dearest_over_mean
from benthic.parallel.pipeline import layers_of_stages
from benthic.parallel.stage_ranks import ranks_of_stages
from benthic.parallel.stages import Stage
from benthic.precision.compute import Compute
from benthic.train.compute import compute_in, refuse_without_tiles
from benthic.train.objective import cross_entropies
from benthic.train.trial import heaviest_mtp

_TIMES = 5


@dataclass(frozen=True)
class StageCosts:
    """Seconds of forward and backward pass of a micro-batch, and cuts."""

    embedding_s: float
    dense_layer_s: float | None
    """None if the model has no such layers."""
    moe_layer_s: float | None
    head_s: float
    """Final norm, head, and the MTP modules that run."""
    layers: list[int]
    """Of each stage, as measured: what ``parallel.layers`` may be set to."""
    dearest_over_mean: float
    """Time of the process with the most to do over an average one's."""
    layers_by_operations: list[int]
    """What is taken where nothing is set."""
    dearest_over_mean_by_operations: float


def bench_stages(config: RunConfig) -> StageCosts:
    """Costs of a recipe's micro-batches, in its precision.

    Raises:
        InputError: the recipe has no pipeline, or too few layers for it.
    """
    if config.parallel.pipeline == 1:
        raise InputError("parallel.pipeline=1 has no stages; give --set parallel.pipeline=N")
    model, length = config.model, config.train.sequence_length
    where = config.parallel.schedule, config.parallel.pipeline
    ranks = ranks_of_stages(*where)
    mtp = heaviest_mtp(config) > 0
    by_operations = layers_of_stages(computed_costs(model, length, mtp=model.num_nextn_predict_layers > 0), *where)
    seconds = _measure(config, mtp=mtp)
    layers = [seconds["dense" if n < model.first_k_dense_replace else "moe"] for n in range(model.num_hidden_layers)]
    costs = Costs(layers, seconds["embedding"], seconds["head"])
    measured = layers_of_stages(costs, *where)
    return StageCosts(
        seconds["embedding"], seconds.get("dense"), seconds.get("moe"), seconds["head"],
        [len(part) for part in measured], dearest_over_mean(costs, measured, ranks),
        [len(part) for part in by_operations], dearest_over_mean(costs, by_operations, ranks),
    )  # fmt: skip


def _measure(config: RunConfig, *, mtp: bool) -> dict[str, float]:
    """Of a model with one layer of each kind, for all of a kind cost the same."""
    compute: Compute = "fp32" if config.precision.compute == "auto" else config.precision.compute
    refuse_without_tiles(compute)
    sizes = _one_of_each(config.model)
    model = build_model(sizes)
    dense = sizes.first_k_dense_replace
    count = sizes.num_hidden_layers
    stages = {
        "embedding": Stage(model, range(0), first=True, last=False),
        "head": Stage(model, range(count, count), first=False, last=True),
    }
    if dense:
        stages["dense"] = Stage(model, range(1), first=False, last=False)
    if count > dense:
        stages["moe"] = Stage(model, range(dense, count), first=False, last=False)
    rows = config.train.micro_batch_size or config.train.batch_size
    micro_batch = _Random(sizes, rows, config.train.sequence_length, sizes.num_nextn_predict_layers if mtp else 0)
    return {name: _seconds(stage, micro_batch, compute) for name, stage in stages.items()}


def _one_of_each(model: ModelConfig) -> ModelConfig:
    dense = min(1, model.first_k_dense_replace)
    sparse = model.num_hidden_layers > model.first_k_dense_replace
    return model.model_copy(update={"num_hidden_layers": dense + sparse, "first_k_dense_replace": dense})


def _seconds(stage: Stage, micro_batch: "_Random", compute: Compute) -> float:
    times = []
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    for _ in range(1 + _TIMES):  # the first allocates and compiles
        x = None if stage.first else torch.randn(stage.size(micro_batch), dtype=dtype, requires_grad=True)
        start = time.perf_counter()
        compute_in(compute, stage, x, micro_batch).sum().backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


class _Random:
    """Random tokens, which load all experts alike."""

    document_BT: Tensor | None = None

    def __init__(self, model: ModelConfig, rows: int, length: int, depths: int) -> None:
        tokens_BS = torch.randint(model.vocab_size, (rows, length + depths + 1))
        self.tokens_BS, self.depths = tokens_BS[:, :-1], depths
        self._targets_KBT = tokens_BS.unfold(1, length, 1)[:, 1:].transpose(0, 1)

    def routed(self, first: int, routings: list[Routing]) -> Tensor | None:
        """The balance loss, if there is one."""
        return torch.stack([routing.balance_loss for routing in routings]).sum() if routings else None

    def predicted(self, states: list[Tensor], head_VD: Tensor) -> Tensor:
        """All cross-entropies."""
        return cross_entropies(states, head_VD, self._targets_KBT).sum()
