"""Muon: momentum whose matrices are orthogonalised before they are applied, for hidden weights.

torch.optim.Muon takes one two-dimensional matrix at a time. Expert weights here are stacks of matrices, and gate and
up projections are stored as one; each matrix in them is its own linear map and is orthogonalised by itself. Matrices
of equal shape, of all layers, go through one batched product.

Legend: N matrices, R rows, C columns.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from benthic.parallel.owners import on_whole

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Odd polynomials that together take every singular value from 1e-3 of the norm to all of it into [0.85, 1.15].

Polar Express (arXiv 2505.16932): each is the best one given what those before it did."""

_BUNDLE_NUMBERS = 2**20
"""Matrix elements orthogonalised at once: enough to keep all threads busy, few enough to stay in the cache."""


def orthogonalize(x_NRC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The orthogonal polar factor of each matrix, nearly: singular vectors kept, singular values within 0.15 of 1.

    ``dtype`` is that of the products; the result has it too. A zero matrix stays zero.
    """
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    x: Tensor = x_NRC.mT if tall else x_NRC
    # A little below 1, so that rounding never takes a singular value to where the first polynomial diverges.
    x = (x / (1.02 * torch.linalg.matrix_norm(x, keepdim=True) + 1e-12)).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        x = polynomial @ x
    return x.mT if tall else x


class Division(NamedTuple):
    """How a matrix is divided, by rows, among processes."""

    rows: int
    """Of the whole."""
    group: ProcessGroup


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, with decoupled weight decay.

    A parameter is (R, C) or a stack (E, R, C); its group's ``parts`` says how many matrices lie one above the other in
    its rows. Updates are scaled by 0.2 sqrt(max(R, C)), which gives them the size of AdamW's
    (Moonlight, arXiv 2502.16982, section 2.2). State per parameter: ``momentum``.

    Of parameters in ``divided``, this process holds some rows: each is orthogonalised by one of the processes.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.float32,
        divided: Mapping[Tensor, Division] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})
        self.dtype = dtype
        self._divided = divided or {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = closure() if closure else None
        for group in self.param_groups:
            whole = [param for param in group["params"] if param not in self._divided]
            self._step_divided([param for param in group["params"] if param in self._divided], group)
            pieces = (piece for param in whole for piece in self._pieces(param, group["parts"]))
            for bundle in _bundles(pieces):
                self._step_bundle(bundle, group["lr"], group["momentum"], group["weight_decay"])
        return loss

    def _step_bundle(self, bundle: list["_Piece"], lr: float, momentum: float, weight_decay: float) -> None:
        for piece in bundle:
            piece.momentum_NRC.lerp_(piece.grad_NRC, 1 - momentum)
        # Nesterov: what the next step's momentum would be, were its gradient this one's.
        updates = [piece.grad_NRC.lerp(piece.momentum_NRC, momentum) for piece in bundle]
        orthogonal = orthogonalize(torch.cat(updates), self.dtype)
        scale = 0.2 * max(orthogonal.shape[1:]) ** 0.5
        shares = torch.split(orthogonal, [len(update) for update in updates])
        for piece, share in zip(bundle, shares, strict=True):
            piece.weight_NRC.mul_(1 - lr * weight_decay).add_(share, alpha=-lr * scale)

    def _step_divided(self, params: list[Tensor], group: dict[str, Any]) -> None:
        params = [param for param in params if param.grad is not None]
        updates = []
        for param in params:
            assert param.grad is not None
            momentum = self._momentum(param)
            momentum.lerp_(param.grad, 1 - group["momentum"])
            updates.append(param.grad.lerp(momentum, group["momentum"]))
        parts, divisions = group["parts"], [self._divided[param] for param in params]

        def orthogonal(_: int, update_RC: Tensor) -> Tensor:
            return orthogonalize(update_RC.unflatten(0, (parts, -1)), self.dtype).flatten(0, 1)

        rows = [division.rows for division in divisions]
        shares = on_whole(updates, rows, divisions[0].group, orthogonal) if params else []
        for param, share, count in zip(params, shares, rows, strict=True):
            scale = 0.2 * max(count // parts, param.shape[1]) ** 0.5
            param.mul_(1 - group["lr"] * group["weight_decay"]).add_(share, alpha=-group["lr"] * scale)

    def _momentum(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        found: Tensor = state["momentum"]
        return found

    def _pieces(self, param: Tensor, parts: int) -> Iterator["_Piece"]:
        """A parameter's matrices, with gradient and momentum, in pieces of bounded size."""
        if param.grad is None:
            return
        shape = (-1, param.shape[-2] // parts, param.shape[-1])
        tensors = (tensor.view(shape) for tensor in (param, param.grad, self._momentum(param)))
        count = _matrices_per_bundle(shape[1:])
        yield from (_Piece(*piece) for piece in zip(*(tensor.split(count) for tensor in tensors), strict=True))


class _Piece(NamedTuple):
    weight_NRC: Tensor
    grad_NRC: Tensor
    momentum_NRC: Tensor


def _bundles(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces of equal matrix shape, together of bounded size."""
    waiting: dict[tuple[int, ...], list[_Piece]] = defaultdict(list)
    for piece in pieces:
        shape = tuple(piece.weight_NRC.shape[1:])
        if sum(len(other.weight_NRC) for other in waiting[shape]) + len(piece.weight_NRC) > _matrices_per_bundle(shape):
            yield waiting.pop(shape)
        waiting[shape].append(piece)
    yield from waiting.values()


def _matrices_per_bundle(shape: tuple[int, ...]) -> int:
    return max(1, _BUNDLE_NUMBERS // (shape[0] * shape[1]))
