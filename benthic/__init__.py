"""Benthic: the DeepSeek-V3 system for a small team.

Public names are these and no others. They are imported when first used, so that ``benthic --help`` need not wait
for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from benthic.version import VERSION

if TYPE_CHECKING:
    from benthic.api import Engine, load, train
    from benthic.data.tokenizer import Tokenizer
    from benthic.train.planned import plan

__version__ = VERSION
__all__ = ["Engine", "Tokenizer", "__version__", "load", "plan", "train"]

_HOMES = {"Engine": "benthic.api", "Tokenizer": "benthic.data.tokenizer", "load": "benthic.api"}
_CALLABLE_PACKAGES = ("plan", "train")


def __getattr__(name: str) -> Any:
    if name in _CALLABLE_PACKAGES:
        return importlib.import_module(f"benthic.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'benthic' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
