"""What a run's stages are measured to reach, a file for each: ``RUN/evaluation/STAGE.json``.

Evaluation writes them, the report and the model card read them. What was left out is in them too, with the reason, so
that nobody takes it for forgotten.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from benthic.config.base import Natural, Positive, Settings
from benthic.config.complain import complaint
from benthic.errors import InputError
from benthic.evaluate.score import Score
from benthic.files import read_json_object, write_atomically

FOLDER = "evaluation"


class Sampled(Settings):
    """An answer that the model gave."""

    prompt: str
    """What it was asked; of a conversation, its last message."""
    answer: str
    wanted: str | None = None
    """The right answer, where one is known."""
    score: float | None = None
    """What a verifier gave it, where one judged; 1 is right."""


class Curve(Settings):
    """Bits per byte along held-out sequences, a mean for each stretch of them."""

    name: str
    """Of the model that read them: ``with YaRN``, ``without YaRN``."""
    ends: tuple[Positive, ...]
    """The position that each stretch ends before, rising; the first begins at 0."""
    bits_per_byte: tuple[float, ...]

    @model_validator(mode="after")
    def _a_mean_for_each(self) -> Self:
        if len(self.ends) != len(self.bits_per_byte) or sorted(set(self.ends)) != list(self.ends):
            raise ValueError("must have a value for each of ends, which must rise")
        return self


class EvaluationRecord(Settings):
    """All that was measured of the model that a stage ended with."""

    stage: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
    step: Natural
    """Of the stage."""
    when: str
    """It was measured, in UTC: ``2025-01-31T12:00:00+00:00``."""
    seconds: Annotated[float, Field(ge=0)]
    """That it took."""
    scores: dict[str, Score] = Field(default_factory=dict)
    """By task, as ``benthic eval --json`` has them."""
    acceptance: tuple[Score, ...] = ()
    """Share of the tokens drafted by each MTP depth that the model itself would have written."""
    samples: tuple[Sampled, ...] = ()
    """The same prompts for every stage, so that answers can be laid side by side."""
    pretrained_length: Positive | None = None
    """Tokens of a sequence in pretraining, where ``by_position`` is there."""
    by_position: tuple[Curve, ...] = ()
    not_measured: dict[str, str] = Field(default_factory=dict)
    """What was left out, and why."""
    measured: tuple[str, ...] = ()
    """Measures that were taken, with or without a result; what failed is not among them."""
    asked: str = ""
    """Digest of the model and of what was asked of it: where it is another, all is measured anew."""

    @model_validator(mode="after")
    def _scores_are_finite(self) -> Self:
        for name, score in (*self.scores.items(), *(("acceptance", score) for score in self.acceptance)):
            if not all(map(math.isfinite, (score.value, *(score.ci95 or ())))):
                raise ValueError(f"{name}: {score.value} is not finite")
        return self

    def save(self, run: Path) -> Path:
        """Write ``run/evaluation/STAGE.json``, over what an earlier evaluation left; returns its path."""
        path = run / FOLDER / f"{self.stage}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False))
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read such a file. Raises InputError if it is none, or damaged."""
        content = read_json_object(path)
        try:
            record = cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            raise InputError(complaint(error, cls, str(path))) from None
        if record.stage != path.stem:
            raise InputError(f"{path}: is of stage {record.stage!r}; its name must be that")
        return record


def evaluations(run: Path) -> Iterator[Path]:
    """The files that :meth:`EvaluationRecord.load` reads, by name."""
    yield from sorted((run / FOLDER).glob("*.json"))
