"""The kind of model a run trains, given to the trainer from outside: so a baseline goes through the same code."""

from typing import Any, Protocol

from benthic.config.schema import ModelConfig
from benthic.model import LanguageModel, Trainable
from benthic.plan.flops import training_flops


class Architecture(Protocol):
    """How a model comes out of ``[model]`` settings, and what the trainer must know of it besides."""

    def build(self, config: ModelConfig) -> Trainable:
        """A model whose weights are not set yet, made on torch's present device: on ``meta`` it takes no memory.

        Its weights are set by :class:`benthic.model.initial.InitialWeights`, or come from a checkpoint.
        """

    def training_flops(self, config: ModelConfig, length: int, *, mtp: bool) -> float:
        """Operations of forward and backward pass for one token of a sequence of this length, MTP included or not."""

    def settings(self) -> dict[str, Any]:
        """What tells it from other kinds and sizes, as JSON has it; a run resumes only with the same."""


class DeepSeekV3:
    """The model that ``[model]`` describes."""

    def build(self, config: ModelConfig) -> Trainable:
        """Transformer and MTP modules of these sizes."""
        return LanguageModel(config)

    def training_flops(self, config: ModelConfig, length: int, *, mtp: bool) -> float:
        """As :mod:`benthic.plan.flops` counts them, with causal attention."""
        return training_flops(config, length, mtp=mtp)

    def settings(self) -> dict[str, Any]:
        """None besides ``[model]``."""
        return {}


DEEPSEEK_V3 = DeepSeekV3()
