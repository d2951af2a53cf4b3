"""Whether a model can be trained in this machine's memory at all, asked before hours of work or a crash tell."""

import os

from benthic.config.schema import ModelConfig
from benthic.errors import InputError
from benthic.plan.counts import main_model, mtp_modules

_BYTES_PER_PARAMETER = 16
"""Of fp32 weight, gradient and AdamW's two moments; activations come on top."""


def refuse_too_large(config: ModelConfig) -> None:
    """Raise ``InputError`` if weights, gradients and optimizer state alone exceed this machine's memory."""
    parameters = main_model(config).total + mtp_modules(config).total
    needed, there = parameters * _BYTES_PER_PARAMETER, _memory_bytes()
    if there is not None and needed > there:
        raise InputError(
            f"model: training {parameters / 1e9:,.1f}B parameters takes at least {needed / 2**30:,.0f} GiB; "
            f"this machine has {there / 2**30:,.0f} GiB"
        )


def _memory_bytes() -> int | None:
    """Physical memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
