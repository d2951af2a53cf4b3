"""AdamW that keeps its moments in fewer bits than the weights, which torch.optim.AdamW refuses to do."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) on fp32 weights and gradients, its moments stored in ``moments`` (V3 report 3.3.3).

    All arithmetic is fp32, or as the weights are. An update uses the moments before they are rounded. State per
    parameter: ``step``, ``exp_avg`` and ``exp_avg_sq``, as torch.optim.AdamW has them.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float],
        eps: float,
        moments: torch.dtype = torch.bfloat16,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = closure() if closure else None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)
        return loss

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), device=param.device)
            state["exp_avg"] = torch.zeros_like(param, dtype=self.moments)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=self.moments)
        beta1, beta2 = group["betas"]
        step = state["step"].add_(1)
        first, second = (state[key].to(param.dtype, copy=True) for key in ("exp_avg", "exp_avg_sq"))
        first.lerp_(grad, 1 - beta1)
        second.lerp_(grad.square(), 1 - beta2)
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        first /= 1 - beta1**step
        second /= 1 - beta2**step
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.addcdiv_(first, second.sqrt_().add_(group["eps"]), value=-group["lr"])
