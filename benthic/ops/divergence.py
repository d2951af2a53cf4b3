"""How far one state's next tokens are from another's under the same linear head, without all logits at once.

What a draft is to be learnt from: the distribution of the model it drafts for tells more than the one token that came.

Shapes: N positions, D model width, V vocabulary, C positions of a chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 512


def linear_divergence_reference(student_ND: Tensor, teacher_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """Mean over positions of KL(teacher || student) between the two softmaxes over ``x @ weight.T``, in nats."""
    student_NV, teacher_NV = ((x_ND @ weight_VD.T).log_softmax(-1) for x_ND in (student_ND, teacher_ND))
    return (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1).mean()


def linear_divergence(student_ND: Tensor, teacher_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """Same as :func:`linear_divergence_reference`, in fp32 at least; 0 without positions.

    The student alone gets a gradient, computed chunk by chunk during the forward pass.
    """
    divergence: Tensor = _LinearDivergence.apply(student_ND, teacher_ND.detach(), weight_VD.detach())
    return divergence


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_ND: Tensor, teacher_ND: Tensor, weight_VD: Tensor) -> Tensor:
        precise = torch.promote_types(student_ND.dtype, torch.float32)
        count = max(len(student_ND), 1)
        total, dstudent_ND = torch.zeros((), dtype=precise, device=student_ND.device), torch.empty_like(student_ND)
        for start in range(0, len(student_ND), _CHUNK):
            rows = slice(start, start + _CHUNK)
            student_CV, teacher_CV = (
                (x_ND[rows] @ weight_VD.T).to(precise).log_softmax(-1) for x_ND in (student_ND, teacher_ND)
            )
            likely_CV = teacher_CV.exp()
            total += (likely_CV * teacher_CV.sub_(student_CV)).sum()
            dlogits_CV = student_CV.exp_().sub_(likely_CV).div_(count)
            torch.mm(dlogits_CV.to(weight_VD.dtype), weight_VD, out=dstudent_ND[rows])
        ctx.save_for_backward(dstudent_ND)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = grads
        (dstudent_ND,) = ctx.saved_tensors
        return dstudent_ND * scale.to(dstudent_ND.dtype), None, None
