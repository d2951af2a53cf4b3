"""What this process holds of a tensor that is divided among several."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def is_divided(tensor: Tensor) -> bool:
    """Whether others hold parts of it, or copies of this part."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part held here, in the same memory; a tensor that is not divided is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
