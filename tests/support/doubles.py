"""transformers in float64 throughout: its norms and routers round to fp32, whatever the model's dtype."""

from importlib import import_module

import torch
from torch.overrides import TorchFunctionMode

_ROUNDING = {
    "deepseek_v3.modeling_deepseek_v3": ("DeepseekV3RMSNorm", "DeepseekV3TopkRouter"),
    "llama.modeling_llama": ("LlamaRMSNorm",),
}
_CONVERSIONS = (torch.Tensor.to, torch.Tensor.type, torch.Tensor.float)


class _KeepDoubles(TorchFunctionMode):
    """What is float64 is not made fp32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rounds = function is torch.Tensor.float or torch.float32 in (*args[1:], *kwargs.values())
        if function in _CONVERSIONS and args[0].dtype == torch.float64 and rounds:
            return args[0]
        return function(*args, **kwargs)


def keep_doubles(monkeypatch):
    """Until the test ends; models in fp32 compute as before."""
    for module, names in _ROUNDING.items():
        for name in names:
            part = getattr(import_module(f"transformers.models.{module}"), name)
            monkeypatch.setattr(part, "forward", _with_doubles(part.forward))


def _with_doubles(forward):
    def kept(*args, **kwargs):
        with _KeepDoubles():
            return forward(*args, **kwargs)

    return kept
