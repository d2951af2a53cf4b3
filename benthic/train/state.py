"""Everything a step changes, and how it goes into a checkpoint and comes back bit for bit."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benthic.config.posttrain import AdapterConfig
from benthic.config.schema import ModelConfig, RunConfig, TrainConfig
from benthic.errors import InputError
from benthic.model import LanguageModel, Trainable
from benthic.model.initial import InitialWeights, Part
from benthic.model.memory import give_memory
from benthic.parallel.local import local
from benthic.parallel.world import ALONE, World
from benthic.precision.compute import Compute
from benthic.train.adapter import AdapterOptimizer, Adapters
from benthic.train.architecture import DEEPSEEK_V3, Architecture
from benthic.train.checkpoint import Checkpoint, copy_into, load
from benthic.train.compute import moments_dtype
from benthic.train.ema import WeightAverage
from benthic.train.health import Health
from benthic.train.objective import Objective
from benthic.train.optimizer import ModelOptimizer
from benthic.train.parts import everything
from benthic.train.recompute import recompute_activations
from benthic.train.shares import Shares


class Carried(NamedTuple):
    """What a stage carries from one step to the next besides model and optimizer, such as rollouts not used up."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    """As JSON has it."""


NOTHING = Carried({}, {})


class TrainState:
    """Model, optimizer and average of the weights after ``step`` steps. Training draws no random numbers."""

    def __init__(
        self,
        config: RunConfig,
        architecture: Architecture = DEEPSEEK_V3,
        adapter: AdapterConfig | None = None,
        world: World = ALONE,
        *,
        fresh: bool = True,
    ) -> None:
        """Of the model, only what this process is to hold is ever made.

        Args:
            fresh: weights are drawn; otherwise they are whatever memory holds, until a checkpoint is loaded.
        """
        self._world, self._architecture, self._model_config = world, architecture, config.model
        self.step = 0
        self.bits_per_byte: float | None = None
        """Of the last validation; of the averaged weights, where an average is kept."""
        self.sequences_passed_over = 0
        """Sequences that roll-backs left unread: by so many the data is ahead of the course."""
        self.health = Health(config.train.on_spike, config.train.spike_deviations)
        self.model = _without_memory(architecture, config.model)
        initial = InitialWeights(self.model)
        if config.train.recompute:
            recompute_activations(self.model)
        self.objective = Objective(self.model)
        compute: Compute = "fp32" if config.precision.compute == "auto" else config.precision.compute
        world.spread(self.objective, compute, config.train.sequence_length)
        holdings = world.holdings(self.model)
        self.shares = None if holdings is None else Shares(world.rank, holdings)
        """What each process holds, where there are several."""
        world.materialise(self.objective)
        if fresh:
            std, train = config.model.initializer_range, config.train
            initial.fill(self._parts(), std, train.seed, embedding_std=train.embedding_std)
        if config.train.device != "cpu":
            self.objective.to(device_of(config.train))
        moments = moments_dtype(compute)
        self.adapters = Adapters(self.model, adapter, config.train.seed) if adapter else None
        self.optimizer = (
            AdapterOptimizer(self.adapters, config.train.optimizer, moments)
            if self.adapters
            else ModelOptimizer(self.model, config.train.optimizer, moments)
        )
        decay = config.train.ema_decay
        self.average = WeightAverage(self.model, decay) if decay else None

    def to_checkpoint(self, run: dict[str, object], carried: Carried = NOTHING, *, on_schedule: bool) -> Checkpoint:
        """Tensors and numbers, with what identifies the run, and whether it would be saved had no signal come.

        Of tensors that are divided among processes it has what this one holds.
        """
        tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_tensors()}
        if self.average is not None:
            tensors["average"] = self.average.tensors
        if self.adapters is not None:
            tensors["adapters"] = self.adapters.tensors()
        if carried.tensors:
            tensors["carried"] = carried.tensors
        numbers = {
            "step": self.step,
            "bits_per_byte": self.bits_per_byte,
            "sequences_passed_over": self.sequences_passed_over,
            "health": self.health.to_json(),
            "carried": carried.numbers,
            "on_schedule": on_schedule,
        }
        return Checkpoint(tensors, {**numbers, "run": run})

    def load(self, path: Path, groups: Collection[str] | None = None) -> Checkpoint:
        """What this process holds of a checkpoint that any number of processes have saved, for what follows here.

        It is read into the state's own memory, a tensor at a time, so that nothing is there twice.

        Raises InputError on all processes if it is damaged or of another model.
        """
        wanted = everything if self.shares is None else self.shares.wanted
        targets = self._memory(groups)

        def keep(group: str, name: str, tensor: Tensor) -> Tensor:
            target = targets.get(group, {}).get(name)
            if target is None or (target.shape, target.dtype) != (tensor.shape, tensor.dtype):
                return tensor  # which is refused when all names are known
            return target.copy_(tensor)

        return self._world.together(lambda: load(path, groups, wanted, keep))

    def _memory(self, groups: Collection[str] | None) -> dict[str, dict[str, Tensor]]:
        """Where groups of tensors, by default all, come to be."""
        found = {"model": {name: local(tensor.detach()) for name, tensor in self.model.state_dict().items()}}
        if self.average is not None:
            found["average"] = self.average.tensors
        if groups is None or "optimizer" in groups:
            found["optimizer"] = self.optimizer.room_for_state()
        return found

    def compare_copies(self) -> None:
        """Raise CopiesDiffer if processes that should hold the same numbers do not."""
        if self.shares is not None:
            self._world.compare(self.to_checkpoint({}, on_schedule=True).tensors, self.shares.holdings)

    def whole_model(self) -> Trainable:
        """The model; on the main process of several a whole one, which the others have sent their parts of."""
        weights = self._world.whole(self.model, {"model": self.model.state_dict()})["model"]
        if self._world.processes == 1 or not self._world.main:
            return self.model
        model = give_memory(_without_memory(self._architecture, self._model_config))
        copy_into(model.state_dict(), weights, "the processes")
        return model

    def _parts(self) -> dict[str, Part]:
        """What this process holds, as parts of the whole model's tensors."""
        starts = {} if self.shares is None else {name: piece.start for name, piece in self.shares.holding.items()}
        return {name: Part(local(held), starts.get(name, 0)) for name, held in self.model.state_dict().items()}

    def restore(self, checkpoint: Checkpoint, source: str) -> None:
        """Become what was saved. Raises InputError, naming ``source``, if it does not fit."""
        self._take_weights(checkpoint, source, {"model", "optimizer"} | ({"adapters"} if self.adapters else set()))
        if self.adapters is not None:
            self.adapters.restore(checkpoint.tensors["adapters"], f"{source}/adapters.safetensors")
        self.optimizer.load_state_tensors(checkpoint.tensors["optimizer"], f"{source}/optimizer.safetensors")
        self._restore_numbers(checkpoint.state, f"{source}/state.json")

    def begin_mtp(self) -> None:
        """Let the MTP modules, which have not run so far, begin as the last layer is by now."""
        if isinstance(self.model, LanguageModel):
            changed = self.model.mtp_as_last_layer()
            if self.average is not None:
                self.average.begin_anew(changed)

    def begin_with(self, checkpoint: Checkpoint, source: str) -> None:
        """Begin a stage with the weights, routers' bias and average that the stage before ended with.

        Nothing else passes over: a stage has moments, and a notion of what a spike is, of its own. A stage that
        keeps no average begins with the one that is there. Raises InputError, naming ``source``, if it does not fit.
        """
        if self.average is None:
            checkpoint = Checkpoint({"model": weights_of(checkpoint)}, checkpoint.state)
        self._take_weights(checkpoint, source, {"model"})
        if self.adapters is not None:
            self.adapters.begin()

    @torch.no_grad()
    def _take_weights(self, checkpoint: Checkpoint, source: str, groups: set[str]) -> None:
        groups = groups | ({"average"} if self.average is not None else set())
        found = checkpoint.tensors.keys() - {"carried"}
        if found != groups:
            raise InputError(f"{source}: holds {', '.join(sorted(found))}; this run needs {', '.join(sorted(groups))}")
        copy_into(self.model.state_dict(), checkpoint.tensors["model"], f"{source}/model.safetensors")
        if self.average is not None:
            copy_into(self.average.tensors, checkpoint.tensors["average"], f"{source}/average.safetensors")

    def _restore_numbers(self, saved: dict[str, Any], source: str) -> None:
        for key, allowed in (("bits_per_byte", float | None), ("sequences_passed_over", int)):
            if not isinstance(saved.get(key), allowed):
                raise InputError(f"{source}: {key}={saved.get(key)!r} must be a number")
        self.health.restore(saved.get("health"), source)
        self.step, self.bits_per_byte = saved["step"], saved["bits_per_byte"]
        self.sequences_passed_over = saved["sequences_passed_over"]


def device_of(train: TrainConfig) -> torch.device:
    """Where a model is trained."""
    return torch.device(train.device)


def _without_memory(architecture: Architecture, config: ModelConfig) -> Trainable:
    with torch.device("meta"):
        return architecture.build(config)


def weights_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights, with buffers, that a checkpoint stands for: the averaged ones where an average was kept."""
    return {**checkpoint.tensors.get("model", {}), **checkpoint.tensors.get("average", {})}


def carried_in(checkpoint: Checkpoint, source: str) -> Carried:
    """What :meth:`TrainState.to_checkpoint` was given. Raises InputError, naming ``source``, if it is no such thing."""
    numbers = checkpoint.state.get("carried", {})
    if not isinstance(numbers, dict):
        raise InputError(f"{source}/state.json: carried={numbers!r:.80} must be an object")
    return Carried(checkpoint.tensors.get("carried", {}), numbers)
