"""Everything a step changes, and how it goes into a checkpoint and comes back bit for bit."""

import torch

from benthic.config.schema import RunConfig
from benthic.errors import InputError
from benthic.model import build_model
from benthic.train.checkpoint import Checkpoint, copy_into
from benthic.train.ema import WeightAverage
from benthic.train.objective import Objective
from benthic.train.optimizer import ModelOptimizer


class TrainState:
    """Model, optimizer and average of the weights after ``step`` steps. Training draws no random numbers."""

    def __init__(self, config: RunConfig) -> None:
        self.step = 0
        self.bits_per_byte: float | None = None
        """Of the last validation; of the averaged weights, where an average is kept."""
        self.model = build_model(config.model, seed=config.train.seed)
        self.objective = Objective(self.model)
        self.optimizer = ModelOptimizer(self.model, config.train.optimizer)
        decay = config.train.ema_decay
        self.average = WeightAverage(self.model, decay) if decay else None

    def to_checkpoint(self, run: dict[str, object]) -> Checkpoint:
        """Tensors and numbers, with what identifies the run."""
        tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_tensors()}
        if self.average is not None:
            tensors["average"] = self.average.tensors
        return Checkpoint(tensors, {"step": self.step, "bits_per_byte": self.bits_per_byte, "run": run})

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint, source: str) -> None:
        """Become what was saved. Raises InputError, naming ``source``, if it does not fit."""
        groups = {"model", "optimizer"} | ({"average"} if self.average is not None else set())
        if checkpoint.tensors.keys() != groups:
            raise InputError(
                f"{source}: holds {', '.join(sorted(checkpoint.tensors))}; this run needs {', '.join(sorted(groups))}"
            )
        copy_into(self.model.state_dict(), checkpoint.tensors["model"], f"{source}/model.safetensors")
        self.optimizer.load_state_tensors(checkpoint.tensors["optimizer"], f"{source}/optimizer.safetensors")
        if self.average is not None:
            copy_into(self.average.tensors, checkpoint.tensors["average"], f"{source}/average.safetensors")
        bits_per_byte = checkpoint.state.get("bits_per_byte")
        if not isinstance(bits_per_byte, float | None):
            raise InputError(f"{source}/state.json: bits_per_byte={bits_per_byte!r} must be a number")
        self.step, self.bits_per_byte = checkpoint.state["step"], bits_per_byte
