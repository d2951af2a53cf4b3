"""What each rank of a run has of the run's state, for checkpoints: what it writes of one, and what it reads."""

from collections.abc import Sequence

from torch import Tensor

from benthic.errors import InputError
from benthic.parallel.local import local
from benthic.parallel.pieces import Box, Extent, Holding, Piece, share_out, state_piece, whole
from benthic.train.checkpoint import Checkpoint
from benthic.train.parts import Owned, everything

_ON_EVERY_RANK = frozenset({"carried", "adapters"})
"""Groups whose tensors are whole and the same on every rank; rank 0 writes them."""


class Shares:
    """The state of a run on one rank, by what every rank holds of parameters and buffers."""

    def __init__(self, rank: int, holdings: Sequence[Holding]) -> None:
        """Raises ValueError if the pieces of all ranks together are not the whole model."""
        self.holdings, self.holding = holdings, holdings[rank]
        self._rank = rank
        self._owned = share_out(holdings)[rank]
        self._names = {name for holding in holdings for name in holding}

    def owned(self, checkpoint: Checkpoint) -> Owned:
        """What this rank writes of a state, in which tensors are as the rank has them."""
        return {
            group: {
                name: (piece, local(tensor))
                for name, tensor in tensors.items()
                if (piece := self._to_write(group, name, local(tensor))) is not None
            }
            for group, tensors in checkpoint.tensors.items()
        }

    def wanted(self, group: str, name: str, shape: Extent) -> Box | None:
        """What this rank needs of a stored tensor (:data:`benthic.train.parts.Wanted`).

        Raises InputError if no rank holds the like.
        """
        if group in _ON_EVERY_RANK:
            return everything(group, name, shape)
        if not self._names & {name, name.rpartition(".")[0]}:
            raise InputError(f"tensor {name} of {group} is unknown to this model")
        try:
            piece = state_piece(self.holding, name, shape)
        except ValueError as error:
            raise InputError(str(error)) from error
        return None if piece is None else piece.box

    def _to_write(self, group: str, name: str, tensor: Tensor) -> Piece | None:
        shape = tuple(tensor.shape)
        if group in _ON_EVERY_RANK:
            return whole(name, shape) if self._rank == 0 else None
        parameter = name if name in self.holding else name.rpartition(".")[0]
        piece = self.holding[parameter]
        if parameter not in self._owned:
            return None
        if not shape:  # one number beside a parameter that may be in many pieces
            return None if any(piece.offset) else whole(name, ())
        if shape != piece.size:
            raise ValueError(f"{name} is {shape} on rank {self._rank}, which should hold {piece}")
        return piece._replace(name=name)
