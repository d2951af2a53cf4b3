"""Routed SwiGLU experts as grouped matrix products over tokens sorted by expert.

Nothing is dropped or padded: each expert multiplies exactly the tokens that chose it. The gate scales the hidden
activation, not the output, so the output of an expert need not be kept for the backward pass.

Shapes: N tokens, K experts per token, E experts, D model width, F expert width, S = N * K rows sorted by expert.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.ops import native
from benthic.ops.product import Units, units_for
from benthic.ops.wanted import wanted


def routed_experts_reference(
    x_ND: Tensor, index_NK: Tensor, gate_NK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Sum over a token's experts of gate times SwiGLU, one expert at a time with masks."""
    out_ND = torch.zeros_like(x_ND)
    for expert in range(gate_up_EGD.shape[0]):
        weight_N = (gate_NK * (index_NK == expert)).sum(-1, keepdim=True)
        gate_NF, up_NF = (x_ND @ gate_up_EGD[expert].T).chunk(2, -1)
        out_ND = out_ND + weight_N * ((F.silu(gate_NF) * up_NF) @ down_EDF[expert].T)
    return out_ND


def routed_experts(x_ND: Tensor, index_NK: Tensor, gate_NK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """Same as :func:`routed_experts_reference`, visiting each expert's tokens only.

    Args:
        x_ND: tokens. index_NK: their experts. gate_NK: the weights of these.
        gate_up_EGD: (E, 2F, D), gate rows before up rows. down_EDF: (E, D, F).
    """
    if x_ND.shape[0] == 1 and not torch.is_grad_enabled():
        return _experts_of_one_token(x_ND[0], index_NK[0], gate_NK[0], gate_up_EGD, down_EDF).unsqueeze(0)
    out: Tensor = _RoutedExperts.apply(x_ND, index_NK, gate_NK, gate_up_EGD, down_EDF)
    return out


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, index_NK: Tensor, gate_NK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        x_ND = x_ND.contiguous()
        order_S, slot_NK, counts = sort_by_expert(index_NK, gate_up_EGD.shape[0])
        token_S, gate_S = order_S // index_NK.shape[1], gate_NK.flatten()[order_S]
        inputs = x_ND, token_S, slot_NK, counts, gate_S, gate_up_EGD, down_EDF
        run = _forward_native if native.usable(x_ND, gate_up_EGD, down_EDF) else _forward_torch
        gate_up_SG, out_ND = run(*inputs)
        ctx.save_for_backward(*inputs, gate_up_SG, order_S)
        ctx.units = units_for(x_ND)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, gate_up_SG, order_S = ctx.saved_tensors
        dout_ND, slot_NK = grads[0].contiguous(), inputs[2]
        usable = native.usable(dout_ND, gate_up_SG)
        run = partial(_backward_native, units=ctx.units) if usable else _backward_torch
        of_x, _, of_gate, *of_weights = wanted(ctx)
        dx_ND, dgate_S, dgate_up_EGD, ddown_EDF = run(
            dout_ND, gate_up_SG, *inputs, of_inputs=of_x or of_gate, of_weights=any(of_weights)
        )
        dgate_NK = torch.empty_like(dgate_S).index_copy_(0, order_S, dgate_S).view(slot_NK.shape)
        return dx_ND, None, dgate_NK, dgate_up_EGD, ddown_EDF


@native.unhooked
def _forward_native(
    x_ND: Tensor, token_S: Tensor, slot_NK: Tensor, counts: Tensor, gate_S: Tensor, gate_up_EGD: Tensor,
    down_EDF: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, (n, d), (e, _, f) = len(token_S), x_ND.shape, down_EDF.shape
    gate_up_SG, y_SD, out_ND = (x_ND.new_empty(shape) for shape in ((rows, 2 * f), (rows, d), (n, d)))
    native.call(
        "experts_forward", x_ND, token_S, slot_NK, _offsets(counts), gate_S.float(), gate_up_EGD, down_EDF, gate_up_SG,
        y_SD, out_ND, n, e, d, f, slot_NK.shape[1], int(units_for(x_ND)),
    )  # fmt: skip
    return gate_up_SG, out_ND


def _backward_native(
    dout_ND: Tensor, gate_up_SG: Tensor, x_ND: Tensor, token_S: Tensor, slot_NK: Tensor, counts: Tensor,
    gate_S: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, *, of_inputs: bool, of_weights: bool, units: Units,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    (n, d), (e, _, f) = x_ND.shape, down_EDF.shape
    dgate_S = x_ND.new_empty(len(token_S), dtype=torch.float32)
    dx_SD, dx_ND = (x_ND.new_empty(len(token_S), d), torch.empty_like(x_ND)) if of_inputs else (None, None)
    weights = gate_up_EGD, down_EDF
    dgate_up_EGD, ddown_EDF = map(torch.empty_like, weights) if of_weights else (None, None)
    native.call(
        "experts_backward", dout_ND, x_ND, token_S, slot_NK, _offsets(counts), gate_S.float(), gate_up_SG, gate_up_EGD,
        down_EDF, dx_SD, dx_ND, dgate_S, dgate_up_EGD, ddown_EDF, n, e, d, f, slot_NK.shape[1], int(units),
    )  # fmt: skip
    return dx_ND, dgate_S, dgate_up_EGD, ddown_EDF


def _offsets(counts: Tensor) -> Tensor:
    """Where each expert's rows begin, and the end (E + 1,)."""
    return F.pad(counts.cumsum(0), (1, 0))


def _forward_torch(
    x_ND: Tensor, token_S: Tensor, slot_NK: Tensor, counts: Tensor, gate_S: Tensor, gate_up_EGD: Tensor,
    down_EDF: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gate_up_SG = x_ND.new_empty(len(token_S), gate_up_EGD.shape[1])
    y_SD = x_ND.new_empty(len(token_S), x_ND.shape[1])
    for expert, rows_e in segments(counts):
        torch.mm(x_ND[token_S[rows_e]], gate_up_EGD[expert].T, out=gate_up_SG[rows_e])
        hidden = _swiglu(gate_up_SG[rows_e]).mul_(gate_S[rows_e, None].to(x_ND.dtype))
        torch.mm(hidden, down_EDF[expert].T, out=y_SD[rows_e])
    return gate_up_SG, combine(y_SD, slot_NK)


def _backward_torch(
    dout_ND: Tensor, gate_up_SG: Tensor, x_ND: Tensor, token_S: Tensor, slot_NK: Tensor, counts: Tensor,
    gate_S: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, *, of_inputs: bool, of_weights: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    weights = gate_up_EGD, down_EDF
    dgate_up_EGD, ddown_EDF = map(torch.zeros_like, weights) if of_weights else (None, None)
    dx_SD, dgate_S = x_ND.new_empty(len(token_S), x_ND.shape[1]), torch.empty_like(gate_S)
    for expert, rows_e in segments(counts):
        token_e = token_S[rows_e]
        dy = dout_ND[token_e]
        dhidden = dy @ down_EDF[expert]
        hidden, dgate_up, dgate_S[rows_e] = swiglu_backward(
            gate_up_SG[rows_e], gate_S[rows_e, None].to(x_ND.dtype), dhidden
        )
        if dgate_up_EGD is not None and ddown_EDF is not None:
            torch.mm(dy.T, hidden, out=ddown_EDF[expert])
            torch.mm(dgate_up.T, x_ND[token_e], out=dgate_up_EGD[expert])
        if of_inputs:
            torch.mm(dgate_up, gate_up_EGD[expert], out=dx_SD[rows_e])
    return combine(dx_SD, slot_NK) if of_inputs else None, dgate_S, dgate_up_EGD, ddown_EDF


def _experts_of_one_token(
    x_D: Tensor, index_K: Tensor, gate_K: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """A decode step of one sequence: matrix-vector products that read each chosen expert once, and no sorting."""
    if native.usable(x_D, gate_up_EGD, down_EDF):
        (_, d, f), k = down_EDF.shape, len(index_K)
        gate_up_KG, hidden_KF = (x_D.new_empty(k, width, dtype=torch.float32) for width in (2 * f, f))
        out_D = torch.empty_like(x_D)
        native.call(
            "experts_of_one_token", x_D.contiguous(), index_K, gate_K.float(), gate_up_EGD, down_EDF, gate_up_KG,
            hidden_KF, out_D, d, f, k,
        )  # fmt: skip
        return out_D
    experts: list[int] = index_K.tolist()
    gate_up_KG = torch.stack([gate_up_EGD[expert] @ x_D for expert in experts])
    hidden_KF = _swiglu(gate_up_KG).mul_(gate_K.to(x_D.dtype).unsqueeze(1))
    out_D = torch.zeros_like(x_D)
    for expert, hidden_F in zip(experts, hidden_KF, strict=True):
        out_D.addmv_(down_EDF[expert], hidden_F)
    return out_D


def sort_by_expert(index_NK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flat choices in order of their expert (S,), where each choice went (N, K), and how many each expert got."""
    flat = index_NK.flatten()
    order_S = flat.argsort(stable=True)
    slot = torch.empty_like(order_S)
    slot[order_S] = torch.arange(len(order_S), device=order_S.device)
    return order_S, slot.view(index_NK.shape), torch.bincount(flat, minlength=n_experts)


def segments(counts: Tensor) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has any."""
    segments, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            segments.append((expert, slice(start, start + count)))
        start += count
    return segments


def combine(y_SD: Tensor, slot_NK: Tensor) -> Tensor:
    """Sum of each token's rows (N, D)."""
    out_ND = y_SD[slot_NK[:, 0]]
    for k in range(1, slot_NK.shape[1]):
        out_ND += y_SD[slot_NK[:, k]]
    return out_ND


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def swiglu_backward(gate_up: Tensor, weight: Tensor, dhidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For hidden = weight * silu(gate) * up: (hidden, d gate_up, d weight summed over the width)."""
    gate, up = gate_up.chunk(2, -1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    activated = silu * up
    dweight = (dhidden * activated).sum(-1)
    dactivated = dhidden * weight
    dgate = dactivated * up * (sigmoid + silu * (1 - sigmoid))
    return activated * weight, torch.cat((dgate, dactivated * silu), -1), dweight
