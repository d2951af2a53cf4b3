"""Whether a model fits into this machine's memory at all, asked before hours of work or a crash tell."""

import os
from contextlib import suppress
from pathlib import Path

from benthic import torchrun
from benthic.config.schema import ModelConfig, RunConfig
from benthic.errors import InputError
from benthic.plan.counts import main_model, mtp_modules

TRAINING_BYTES = 16
"""Of a parameter's fp32 weight, gradient and AdamW's two moments; activations come on top."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def refuse_too_large(
    config: ModelConfig,
    *,
    doing: str = "training",
    bytes_per_parameter: int = TRAINING_BYTES,
    further_bytes: int = 0,
    share: float = 1.0,
) -> None:
    """Raise ``InputError`` if a model, and what comes with it, exceeds this machine's memory for certain.

    Args:
        config: sizes of the model.
        doing: what the message says is done with it.
        bytes_per_parameter: held at the least.
        further_bytes: held besides, such as a cache.
        share: of the parameters, that this machine has.
    """
    parameters = main_model(config).total + mtp_modules(config).total
    needed, there = share * parameters * bytes_per_parameter + further_bytes, _memory_bytes()
    if there is not None and needed > there:
        besides = f" with {further_bytes / 2**30:,.1f} GiB of cache" if further_bytes else ""
        each = "" if share == 1 else " on each machine"
        raise InputError(
            f"model: {doing} {parameters / 1e9:,.1f}B parameters{besides} takes at least {needed / 2**30:,.0f} GiB"
            f"{each}; this machine has {there / 2**30:,.0f} GiB"
        )


def refuse_too_large_together(config: RunConfig) -> None:
    """The same for a model that the processes which torchrun has started train, as many on each machine."""
    here, everywhere = torchrun.processes_here(), torchrun.processes()
    refuse_too_large(config.model, share=config.parallel.replicate * here / everywhere)


def _memory_bytes() -> int | None:
    """Physical memory, or the part of it that a container may use; None where the system does not tell."""
    found = []
    with suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(ValueError, OSError):  # "max" where there is no limit
        found.append(int(_CGROUP_LIMIT.read_text()))
    return min(found, default=None)
