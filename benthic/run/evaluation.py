"""The models that a run's stages of training have led to, measured one after another: ``RUN/evaluation/STAGE.json``.

Each measure is written down as soon as it is taken, so that a kill costs one. A measure that fails is told in a line
and noted in the record; the others are taken all the same, and the next evaluation tries it again.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benthic.config.schema import RunConfig
from benthic.config.stages import Stage, stages
from benthic.convert.resolve import load_checkpoint
from benthic.errors import InputError, WorkFailed
from benthic.evaluate.records import FOLDER, EvaluationRecord
from benthic.files import read_json_object, sha256
from benthic.run.measures import Found, Measure, Subject, measures, tasks

Progress = Callable[[str, int, int], None]
"""Called with what is measured, how much of it is done, and of how much."""
Trouble = Callable[[str], None]
"""Called with a line for each measure that failed."""
Passed = Callable[[int, int], None]
"""Called with how many models have been measured, and of how many."""
FAILURES = (InputError, WorkFailed, OSError, MemoryError)
"""What ends a measure, and not the evaluation."""


def evaluate_run(
    run: Path, config: RunConfig, progress: Progress = lambda *of: None, trouble: Trouble = lambda line: None,
    passed: Passed = lambda *of: None,
) -> int:  # fmt: skip
    """Measure what each finished stage of training ended with, or what is still to be measured of it.

    Args:
        run: the directory.
        config: of the run, as resolved.
        progress: told of the course.
        trouble: told of what failed.
        passed: told of each model that is done with.

    Returns:
        How many measures failed.

    Raises:
        InputError: a task file cannot be used, or a checkpoint is damaged.
    """
    wanted, failed = measures(run, config), 0
    incomplete = _incomplete(run, config, wanted)
    for done, one in enumerate(incomplete, 1):
        failed += one.take(wanted, progress, trouble)
        passed(done, len(incomplete))
    return failed


def remaining(run: Path, config: RunConfig) -> int:
    """Models of finished stages that something is still to be measured of. Raises as :func:`evaluate_run`."""
    return len(_incomplete(run, config, measures(run, config)))


def finished(run: Path, config: RunConfig) -> list[tuple[Stage, Path]]:
    """The stages of training that have come to their end, and the checkpoints they ended with."""
    found = []
    for stage in stages(config):
        last = run / "checkpoints" / stage.name / f"step-{stage.steps}"
        if last.is_dir() and (stage.steps or stage.kind == "base"):
            found.append((stage, last))
    return found


def records(run: Path, config: RunConfig) -> list[EvaluationRecord]:
    """What is there of finished stages, in order. Raises InputError if one is damaged."""
    paths = [run / FOLDER / f"{stage.name}.json" for stage, _ in finished(run, config)]
    return [EvaluationRecord.load(path) for path in paths if path.is_file()]


def _incomplete(run: Path, config: RunConfig, wanted: Sequence[Measure]) -> "list[_Evaluation]":
    return [one for one in _evaluations(run, config) if one.missing(wanted)]


def _evaluations(run: Path, config: RunConfig) -> "list[_Evaluation]":
    settings = config.evaluation.model_dump(mode="json")
    files = {task.name: sha256(task.path) for task in tasks(run, config)}
    found = []
    for stage, path in finished(run, config):
        listed = read_json_object(path / "manifest.json").get("files", {})
        # Of the weights alone, in one file or in parts: the rest of a checkpoint may tell of stages to come.
        weights = {name: entry for name, entry in listed.items() if name.startswith(("model", "average"))}
        digest = hashlib.sha256(json.dumps([settings, files, weights], sort_keys=True).encode()).hexdigest()[:16]
        found.append(_Evaluation(run, config, stage, path, digest))
    return found


class _Evaluation:
    """Of one stage's model; nothing of it is read before something is to be measured."""

    def __init__(self, run: Path, config: RunConfig, stage: Stage, path: Path, asked: str) -> None:
        self._run, self._config, self._stage, self._path = run, config, stage, path
        self._record = self._kept(asked) or EvaluationRecord(
            stage=stage.name, step=stage.steps, when=_now(), seconds=0.0, asked=asked
        )

    def _kept(self, asked: str) -> EvaluationRecord | None:
        """What is there of an earlier evaluation of the same model, if the same was asked of it."""
        path = self._run / FOLDER / f"{self._stage.name}.json"
        try:
            record = EvaluationRecord.load(path) if path.is_file() else None
        except InputError:
            return None  # it can be made anew
        return record if record is not None and record.asked == asked else None

    def missing(self, wanted: Sequence[Measure]) -> list[Measure]:
        """What is not yet there."""
        return [measure for measure in wanted if measure.name not in self._record.measured]

    def take(self, wanted: Sequence[Measure], progress: Progress, trouble: Trouble) -> int:
        """Take what is missing; returns how many failed."""
        missing = self.missing(wanted)
        model, _ = load_checkpoint(self._stage.config.model, self._path)
        subject, failed = Subject(self._run, self._config, self._stage, model), 0
        for measure in missing:
            what = f"{measure.name} of {self._stage.name}"
            progress(what, 0, 0)
            begun = time.perf_counter()
            try:
                found = {"measured": [measure.name], **measure.of(subject, partial(progress, what))}
            except FAILURES as error:
                failed += 1
                line = " ".join(str(error).split()) or type(error).__name__
                found = {"not_measured": {measure.name: line}}
                trouble(f"{what}: {line}")
            self._add(measure.name, found, time.perf_counter() - begun)
        return failed

    def _add(self, name: str, found: Found, seconds: float) -> None:
        record = self._record
        left_out = {key: why for key, why in record.not_measured.items() if key != name}
        changes: dict[str, Any] = {
            "seconds": record.seconds + seconds, "when": _now(),
            "not_measured": left_out | found.get("not_measured", {}),
            "scores": record.scores | found.get("scores", {}),
            **{key: (*getattr(record, key), *found.get(key, ())) for key in ("samples", "by_position", "measured")},
        }  # fmt: skip
        changes |= {key: found[key] for key in ("acceptance", "pretrained_length") if key in found}
        content = {**{key: getattr(record, key) for key in type(record).model_fields}, **changes}
        self._record = EvaluationRecord.model_validate(content)
        self._record.save(self._run)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
