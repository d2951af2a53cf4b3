"""A linear layer whose three matrix products take FP8 operands (V3 report sections 3.3.1 to 3.3.3).

Output and input gradient contract along the rows of what is quantised, so activations and gradients come in tiles of
1 x 128. The weight gradient contracts over tokens and takes both in tiles of 128 x 1: the gradient is quantised once
more, the input is requantised from the FP8 copy that alone is kept for the backward pass.

Dimensions: T tokens, D in, F out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benthic.ops.wanted import wanted
from benthic.precision.blocks import COLUMN_TILE, ROW_TILE
from benthic.precision.fp8 import Quantised, product, quantise


def fp8_linear(
    x: Tensor, weight_FD: Tensor, *, powers_of_two: bool = False, copy_of: Callable[[Tensor], Quantised] = quantise
) -> Tensor:
    """``x weight^T`` (..., F) in fp32, differentiable.

    Args:
        x: activations (..., D).
        powers_of_two: scale activations by powers of two, so that requantising them adds next to no error.
        copy_of: gives the weight's FP8 copy.
    """
    out_TF: Tensor = _Linear.apply(x.flatten(0, -2), weight_FD, copy_of(weight_FD), powers_of_two)
    return out_TF.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_FD: Tensor, weight8_FD: Quantised, powers_of_two: bool) -> Tensor:
        ctx.x_TD, ctx.weight_FD = quantise(x_TD, ROW_TILE, powers_of_two=powers_of_two), weight8_FD
        ctx.powers_of_two = powers_of_two
        return product(ctx.x_TD, ctx.weight_FD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dout_TF, (of_x, of_weight) = grads[0], wanted(ctx)
        dx_TD = product(quantise(dout_TF, ROW_TILE), ctx.weight_FD.mT) if of_x else None
        if not of_weight:
            return dx_TD, None, None, None
        x_TD = ctx.x_TD.requantised(COLUMN_TILE, powers_of_two=ctx.powers_of_two)
        return dx_TD, product(quantise(dout_TF, COLUMN_TILE).mT, x_TD.mT), None, None
