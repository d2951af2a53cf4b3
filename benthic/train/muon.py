"""Muon: momentum whose matrices are orthogonalised before they are applied, for hidden weights.

torch.optim.Muon takes one two-dimensional matrix at a time. Expert weights here are stacks of matrices, and gate and
up projections are stored as one; each matrix in them is its own linear map and is orthogonalised by itself. Matrices
of equal shape, of all layers, go through one batched product.

Legend: N matrices, R rows, C columns.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Odd polynomials that together take every singular value from 1e-3 of the norm to all of it into [0.85, 1.15].

Polar Express (arXiv 2505.16932): each is the best one given what those before it did."""


def orthogonalize(x_NRC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The orthogonal polar factor of each matrix, nearly: singular vectors kept, singular values within 0.15 of 1.

    ``dtype`` is that of the products; the result has it too. A zero matrix stays zero.
    """
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    x = x_NRC.mT if tall else x_NRC
    # A little below 1, so that rounding never takes a singular value to where the first polynomial diverges.
    x = (x / (1.02 * torch.linalg.matrix_norm(x, keepdim=True) + 1e-12)).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, with decoupled weight decay.

    A parameter is (R, C) or a stack (E, R, C); its group's ``parts`` says how many matrices lie one above the other in
    its rows. Updates are scaled by 0.2 sqrt(max(R, C)), which gives them the size of AdamW's
    (Moonlight, arXiv 2502.16982, section 2.2). State per parameter: ``momentum``.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = closure() if closure else None
        for group in self.param_groups:
            self._step_group(group["lr"], group["momentum"], group["weight_decay"], group["parts"], {
                param: param.grad for param in group["params"] if param.grad is not None
            })
        return loss

    def _step_group(
        self, lr: float, momentum: float, weight_decay: float, parts: int, grad_of: dict[Tensor, Tensor]
    ) -> None:
        params, grads = list(grad_of), list(grad_of.values())
        buffers = [self._momentum(p) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        # Nesterov: what the next step's momentum would be, were its gradient this one's.
        updates = torch._foreach_lerp(grads, buffers, momentum)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for param, update in zip(params, updates, strict=True):
            matrices = _matrices(param, parts)
            by_shape[matrices.shape[1:]].append((matrices, _matrices(update, parts)))
        for shape, pairs in by_shape.items():
            orthogonal = orthogonalize(torch.cat([update for _, update in pairs]), self.dtype)
            scale = -lr * 0.2 * max(shape) ** 0.5
            shares = torch.split(orthogonal, [len(matrices) for matrices, _ in pairs])
            for (matrices, _), share in zip(pairs, shares, strict=True):
                matrices.add_(share, alpha=scale)

    def _momentum(self, param: Tensor) -> Tensor:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        return state["momentum"]


def _matrices(param: Tensor, parts: int) -> Tensor:
    """View of a parameter as the (N, R, C) matrices it is made of."""
    return param.view(-1, param.shape[-2] // parts, param.shape[-1])
