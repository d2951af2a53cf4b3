"""Whether a model fits into this machine's memory at all, asked before hours of work or a crash tell."""

import os
from contextlib import suppress
from pathlib import Path

from benthic.config.schema import ModelConfig
from benthic.errors import InputError
from benthic.plan.counts import main_model, mtp_modules

TRAINING_BYTES = 16
"""Of a parameter's fp32 weight, gradient and AdamW's two moments; activations come on top."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def refuse_too_large(
    config: ModelConfig, *, doing: str = "training", bytes_per_parameter: int = TRAINING_BYTES, further_bytes: int = 0
) -> None:
    """Raise ``InputError`` if a model, and what comes with it, exceeds this machine's memory for certain.

    Args:
        config: sizes of the model.
        doing: what the message says is done with it.
        bytes_per_parameter: held at the least.
        further_bytes: held besides, such as a cache.
    """
    parameters = main_model(config).total + mtp_modules(config).total
    needed, there = parameters * bytes_per_parameter + further_bytes, _memory_bytes()
    if there is not None and needed > there:
        besides = f" with {further_bytes / 2**30:,.1f} GiB of cache" if further_bytes else ""
        raise InputError(
            f"model: {doing} {parameters / 1e9:,.1f}B parameters{besides} takes at least {needed / 2**30:,.0f} GiB; "
            f"this machine has {there / 2**30:,.0f} GiB"
        )


def _memory_bytes() -> int | None:
    """Physical memory, or the part of it that a container may use; None where the system does not tell."""
    found = []
    with suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(ValueError, OSError):  # "max" where there is no limit
        found.append(int(_CGROUP_LIMIT.read_text()))
    return min(found, default=None)
