"""What differs between the stages of a run, as the one loop that runs them sees it.

The loop has the optimizer and its guard, checkpoints, resumption, metrics, the ledger and roll-backs. A stage says,
through a :class:`Work`, where its batches come from, what is minimised on them and how the outcome is judged.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from benthic.config.schema import RunConfig
from benthic.config.stages import Stage
from benthic.parallel.world import ALONE, World
from benthic.precision.compute import Compute
from benthic.train.architecture import Architecture
from benthic.train.objective import Losses, Objective
from benthic.train.schedule import Course, StepSettings
from benthic.train.state import Carried, TrainState


class Spent(NamedTuple):
    """What the steps of a stage have read and computed."""

    tokens: int
    flops: float


class Validation(NamedTuple):
    """What a validation found."""

    bits_per_byte: float
    """The figure that people watch, of the averaged weights where an average is kept."""
    row: dict[str, Any]
    """For ``metrics.jsonl``; has no ``step``."""


class Place(NamedTuple):
    """Where a stage stands."""

    stage: Stage
    out: Path
    architecture: Architecture
    course: Course
    began_with: Callable[[], Mapping[str, Tensor]]
    """Reads the weights (with buffers) that the stage began with, by name, from the disk; of the first stage there are
    none, and it may not be called."""
    world: World = ALONE

    @property
    def config(self) -> RunConfig:
        """The settings of the stage."""
        return self.stage.config

    @property
    def compute(self) -> Compute:
        """The precision of its steps."""
        compute = self.config.precision.compute
        assert compute != "auto"
        return compute


class Work(Protocol):
    """One stage's doing. It lives as long as its stage, or until the run rolls back to the stage's beginning."""

    measure: str
    """What ``Validation.bits_per_byte`` is of, as in ``bits per byte of held-out text``."""
    validates_first: bool
    """Whether the weights that the stage begins with are validated too, as step 0."""

    def describe(self) -> str:
        """What the stage reads, for people: ``256 tokens a sequence over notes/``."""

    def batch(self, state: TrainState, settings: StepSettings, first: int) -> Any:
        """What the next step learns from; ``state.step`` steps are done, and ``state.model`` has their weights.

        ``first`` is the number of the batch's first sequence; after a roll-back it is ahead of
        ``settings.first_sequence``. Must depend on nothing but these, settings, seeds and what is carried. Of several
        processes, each takes its own rows (:meth:`World.rows`).
        """

    def gradients(
        self, objective: Objective, batch: Any, settings: StepSettings, *, micro_batch_size: int, compute: Compute
    ) -> Losses:
        """Add the gradients of the batch's loss to the parameters', and return the losses without their graph.

        Called a second time if the first looked wrong; must then do the same again.
        """

    def figures(self) -> dict[str, Any]:
        """What this kind of stage has to say of its last step, over the usual columns of ``metrics.jsonl``."""

    def spent(self, step: int) -> Spent:
        """By the stage's first ``step`` steps; asked for the steps done so far only, but of pretraining for any."""

    def validate(self, state: TrainState, *, last: bool) -> Validation:
        """Judge the model: quickly during the stage, with all there is, and in fp32, at its end."""

    def carry(self) -> Carried:
        """What a checkpoint keeps, so that a resumed stage goes on bit for bit."""

    def restore(self, carried: Carried, source: str) -> None:
        """Become what was saved. Raises InputError, naming ``source``, if it does not fit."""


class Kind(Protocol):
    """Stages of one kind in a run, from before anything is trained."""

    def prepare(self, config: RunConfig) -> tuple[RunConfig, dict[str, str]]:
        """Find what the stages learn from and settle what depends on it (such as steps, by epochs); refuse what cannot
        be. Returns the settings and hashes, by name, of all that a resumed run must find unchanged.

        The same call again must give the same; it is made whenever the run is begun or resumed.
        """

    def open(self, place: Place) -> Work:
        """A stage's work, before its first step; of a resumed one :meth:`Work.restore` follows."""


Kinds = Mapping[str, Callable[[Path], Kind]]
"""By the name of the kind (:data:`benthic.config.stages.Kind`), what makes one for a run's directory."""
