"""SwiGLU experts whose six matrix products take FP8 operands (V3 report sections 3.3.1 to 3.3.3).

What would be sent between devices is quantised once per token, with powers of two for scales: inputs before the up
projection, gradients before the down projection. Kept for the backward pass are the FP8 inputs, and in FP8 the inputs
of SwiGLU, whose output is computed again.

Shapes: N tokens, K experts per token, E experts, D model width, F expert width, G = 2F, S = N * K rows sorted by
expert, R rows of one expert.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benthic.ops.experts import combine, sort_by_expert, swiglu_backward
from benthic.ops.swiglu import swiglu
from benthic.ops.wanted import wanted
from benthic.precision.blocks import ROW_TILE
from benthic.precision.fp8 import Quantised, quantise
from benthic.precision.fp8_groups import Tokens, add_products, batches, multiply_groups

_CopyOf = Callable[[Tensor], Quantised]
"""Gives a weight's FP8 copy."""


def fp8_swiglu(x: Tensor, gate_up_GD: Tensor, down_DF: Tensor, *, copy_of: _CopyOf = quantise) -> Tensor:
    """A shared expert, which is one that every token chooses, with weight 1."""
    x_ND = x.flatten(0, -2)
    index_N1 = torch.zeros(len(x_ND), 1, dtype=torch.long, device=x.device)
    gate_N1 = torch.ones(len(x_ND), 1, device=x.device)
    weights8 = copy_of(gate_up_GD)[None], copy_of(down_DF)[None]
    out_ND: Tensor = _Experts.apply(x_ND, index_N1, gate_N1, gate_up_GD[None], down_DF[None], weights8, 1)
    return out_ND.view_as(x)


def fp8_experts(
    x_ND: Tensor,
    index_NK: Tensor,
    gate_NK: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    parts: Sequence[int] | None = None,
    *,
    copy_of: _CopyOf = quantise,
) -> Tensor:
    """What :func:`benthic.ops.experts.routed_experts` computes, (N, D) in fp32, with FP8 products.

    With ``parts``, the tokens are so many of one batch, then so many of another: no tile of the weight gradients has
    tokens of two, so that the result is the same as if each batch came by itself.
    """
    if parts is not None:
        part_N = torch.arange(len(parts), device=index_NK.device).repeat_interleave(
            torch.tensor(parts, device=index_NK.device)
        )
        index_NK = index_NK + len(down_EDF) * part_N[:, None]
    weights8 = copy_of(gate_up_EGD), copy_of(down_EDF)
    out_ND: Tensor = _Experts.apply(
        x_ND, index_NK, gate_NK, gate_up_EGD, down_EDF, weights8, 1 if parts is None else len(parts)
    )
    return out_ND


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        index_NK: Tensor,
        gate_NK: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
        weights8: tuple[Quantised, Quantised],
        parts: int,
    ) -> Tensor:
        order_S, slot_NK, counts = sort_by_expert(index_NK, parts * len(down_EDF))
        token_S, gate_S = order_S // index_NK.shape[1], gate_NK.flatten()[order_S]
        x8_ND = quantise(x_ND, ROW_TILE, powers_of_two=True)
        gate_up_SG = gate_S.new_empty(len(token_S), gate_up_EGD.shape[1])
        # Sums over experts and parts are as precise as the tokens and weights are.
        y_SD = x_ND.new_empty(len(token_S), down_EDF.shape[1])
        for groups in batches(counts):
            rows = groups.rows
            gate_up_SG[rows] = multiply_groups(x8_ND[token_S[rows]], weights8[0], groups)
            hidden_RF = swiglu(gate_up_SG[rows]) * gate_S[rows, None]
            y_SD[rows] = multiply_groups(quantise(hidden_RF, ROW_TILE), weights8[1], groups)
        ctx.save_for_backward(order_S, slot_NK, counts, token_S, gate_S)
        ctx.weights_dtype = gate_up_EGD.dtype
        ctx.quantised = x8_ND, quantise(gate_up_SG, ROW_TILE), *weights8
        return combine(y_SD, slot_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        order_S, slot_NK, counts, token_S, gate_S = ctx.saved_tensors
        x8_ND, gate_up8_SG, gate_up8_EGD, down8_EDF = ctx.quantised
        dy8_ND = quantise(grads[0], ROW_TILE, powers_of_two=True)
        of_x, _, of_gate, *of_weights = wanted(ctx)
        of_inputs = of_x or of_gate
        dx_SD, dgate_S = grads[0].new_empty(len(token_S), grads[0].shape[1]), torch.empty_like(gate_S)
        copies = (gate_up8_EGD, down8_EDF) if any(of_weights) else ()
        dweights = [gate_S.new_zeros(x.numbers.shape, dtype=ctx.weights_dtype) for x in copies]
        for groups in batches(counts):
            rows = groups.rows
            x8_RD, dy8_RD = x8_ND[token_S[rows]], dy8_ND[token_S[rows]]
            hidden_RF, dgate_up_RG, dgate_S[rows] = swiglu_backward(
                gate_up8_SG[rows].dequantised(), gate_S[rows, None], multiply_groups(dy8_RD, down8_EDF.mT, groups)
            )
            if of_inputs:
                dx_SD[rows] = multiply_groups(quantise(dgate_up_RG, ROW_TILE), gate_up8_EGD.mT, groups)
            if dweights:
                x_RD, dy_RD = (Tokens(x.dequantised(), powers_of_two=True) for x in (x8_RD, dy8_RD))
                dgate_up, hidden = (Tokens(x, powers_of_two=False) for x in (dgate_up_RG, hidden_RF))
                add_products(dweights[0], dgate_up, x_RD, groups)
                add_products(dweights[1], dy_RD, hidden, groups)
        dgate_NK = torch.empty_like(dgate_S).index_copy_(0, order_S, dgate_S).view(slot_NK.shape)
        return combine(dx_SD, slot_NK) if of_inputs else None, None, dgate_NK, *(dweights or (None, None)), None, None
