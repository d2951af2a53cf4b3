"""What this process holds of a tensor that is divided among several.

Most processes never divide anything. PyTorch's modules for it take a second to import, so nobody imports them to find
that out: a tensor can be divided only where they have been imported already.
"""

import sys
from typing import Any

from torch import Tensor


def may_divide() -> bool:
    """Whether this process has imported what divides weights (:mod:`benthic.parallel.shard`)."""
    return "benthic.parallel.shard" in sys.modules


def is_divided(tensor: Tensor) -> bool:
    """Whether others hold parts of it, or copies of this part."""
    # It is there without its names while another thread imports it.
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """The part held here, in the same memory; a tensor that is not divided is its own."""
    held: Any = tensor
    return held.to_local() if is_divided(tensor) else tensor
