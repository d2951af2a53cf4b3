"""A dry run for people and for programs: what ranks hold and send, ranks that are alike together, and a verdict."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from benthic.config.schema import RunConfig
from benthic.plan.hardware import Gpu
from benthic.train.dry_run import DryRun, StageRanks, dry_run

_GB = 1e9


def report_lines(config: RunConfig, gpu: Gpu) -> Iterator[str]:
    """What a dry run finds, and whether it fits. Raises as :func:`dry_run`."""
    run, parallel = dry_run(config), config.parallel
    sizes = " x ".join(f"{axis} {getattr(parallel, axis)}" for axis in ("pipeline", "expert", "shard", "replicate"))
    yield (
        f"{run.total_parameters / 1e9:,.2f}B parameters on {run.processes:,} ranks: {sizes}, ZeRO-{parallel.zero}"
        + (f", {parallel.schedule}" if parallel.pipeline > 1 else "")
    )
    yield (
        f"{run.compute}{', activations recomputed' if config.train.recompute else ''}; a step has {run.passes} "
        f"micro-batches of {run.rows} x {config.train.sequence_length} tokens for each rank"
    )
    if run.visits is not None:
        yield (
            f"a token visits {run.visits.nodes:.2f} nodes of 8 ranks, in {run.visits.messages:.2f} messages for its "
            f"{config.model.num_experts_per_tok} experts, if experts are loaded evenly"
        )
    yield from ("", "held by a rank, GB (1e9 bytes):", *_table(run.stages, "memory"))
    yield from ("", "sent by a rank in a step, GB:", *_table(run.stages, "messages"))
    yield from ("", _verdict(run, gpu))
    least = dry_run(config, fused=True).fullest.memory.total
    yield f"kernels that keep no more than they need, as Benthic has them for CPUs, would hold {least / _GB:.1f} GB"


def report_json(config: RunConfig, gpu: Gpu) -> dict[str, Any]:
    """The same for programs. Sizes are bytes."""
    run = dry_run(config)
    return {
        **asdict(run),
        "stages": [_stage_json(stage) for stage in run.stages],
        "gpu": gpu.name,
        "memory_bytes": gpu.memory_bytes,
        "needed_bytes": run.fullest.memory.total,
        "fits": run.fullest.memory.total <= gpu.memory_bytes,
    }


def _stage_json(stage: StageRanks) -> dict[str, Any]:
    return {
        **asdict(stage),
        "ranks": [stage.ranks.start, stage.ranks.stop - 1],
        "layers": [list(layers) for layers in stage.layers],
        "memory": {**asdict(stage.memory), "total": stage.memory.total},
        "messages": {**asdict(stage.messages), "total": stage.messages.total},
    }


def _verdict(run: DryRun, gpu: Gpu) -> str:
    stage, over = run.fullest, run.fullest.memory.total - gpu.memory_bytes
    needs = f"the fullest ranks, {_numbers(stage.ranks)}, hold {stage.memory.total / _GB:.1f} GB"
    if over > 0:
        return f"does not fit {gpu.name}, {gpu.memory_gb:g} GB: {needs}, {over / _GB:.1f} GB too much"
    return f"fits {gpu.name}, {gpu.memory_gb:g} GB: {needs}, which leaves {-over / _GB:.1f} GB"


def _table(stages: Sequence[StageRanks], part: str) -> Iterator[str]:
    """Ranks by place of the pipeline; kinds that are nothing anywhere are left out."""
    sizes = [asdict(getattr(stage, part)) for stage in stages]
    kinds = [kind for kind in sizes[0] if any(size[kind] for size in sizes)]
    rows = [["ranks", "layers", *kinds, "total"]]
    for _, group in groupby(stages, key=lambda stage: (_contents(stage), getattr(stage, part))):
        alike = list(group)
        found = getattr(alike[0], part)
        ranks = _numbers(range(alike[0].ranks.start, alike[-1].ranks.stop))
        rows.append([ranks, _contents(alike[0]), *(f"{getattr(found, kind) / _GB:.2f}" for kind in [*kinds, "total"])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        yield "  ".join(left + right)


def _contents(stage: StageRanks) -> str:
    layers = " + ".join(str(len(layers)) for layers in stage.layers)
    return ", ".join([layers] + ["embedding"] * stage.embeds + ["head"] * stage.predicts)


def _numbers(numbers: range) -> str:
    return str(numbers.start) if len(numbers) == 1 else f"{numbers.start}-{numbers.stop - 1}"
