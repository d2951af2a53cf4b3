"""The kind of model a run trains, given to the trainer from outside: so a baseline goes through the same code."""

from typing import Any, Protocol

from benthic.config.schema import ModelConfig
from benthic.model import Trainable, build_model
from benthic.plan.flops import training_flops


class Architecture(Protocol):
    """How a model comes out of ``[model]`` settings, and what the trainer must know of it besides."""

    def build(self, config: ModelConfig, *, seed: int) -> Trainable:
        """A model with fresh weights."""

    def training_flops(self, config: ModelConfig, length: int, *, mtp: bool) -> float:
        """Operations of forward and backward pass for one token of a sequence of this length, MTP included or not."""

    def settings(self) -> dict[str, Any]:
        """What tells it from other kinds and sizes, as JSON has it; a run resumes only with the same."""


class DeepSeekV3:
    """The model that ``[model]`` describes."""

    def build(self, config: ModelConfig, *, seed: int) -> Trainable:
        """Transformer and MTP modules of these sizes."""
        return build_model(config, seed=seed)

    def training_flops(self, config: ModelConfig, length: int, *, mtp: bool) -> float:
        """As :mod:`benthic.plan.flops` counts them, with causal attention."""
        return training_flops(config, length, mtp=mtp)

    def settings(self) -> dict[str, Any]:
        """None besides ``[model]``."""
        return {}


DEEPSEEK_V3 = DeepSeekV3()
