"""All that a run's directory holds for its report, read without trusting it: what is missing or damaged is told."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from benthic.config.load import load_run_config
from benthic.config.schema import ModelConfig, RunConfig
from benthic.config.stages import BASE, Stage, stages
from benthic.data.manifest import FILE_NAME as MANIFEST
from benthic.data.manifest import Manifest
from benthic.errors import InputError
from benthic.evaluate.records import EvaluationRecord, evaluations
from benthic.files import read_json_object
from benthic.posttrain.distil import read_manifest
from benthic.posttrain.sft_data import FOLDER as SFT
from benthic.report.course import StageCourse, read_course
from benthic.train.ledger import FILE_NAME as LEDGER

SIGNS = ("config.toml", f"data/{MANIFEST}", "metrics.jsonl", "model/config.json")
"""Any of these makes a directory a run's."""
_T = TypeVar("_T")


class Progress(NamedTuple):
    """How far a stage has come."""

    name: str
    kind: str
    done: int
    """Steps."""
    planned: int | None
    """None as long as nobody knows."""

    @property
    def state(self) -> str:
        """In a word or two."""
        if self.kind == "base":
            return "brought from elsewhere"
        if not self.done:
            return "not begun"
        return "done" if self.done == self.planned else "not finished"


@dataclass(frozen=True)
class Facts:
    """What is known of a run."""

    run: Path
    model: ModelConfig | None
    """Sizes."""
    config: RunConfig | None
    settings: str
    """``config.toml`` as it stands."""
    progress: list[Progress]
    course: dict[str, StageCourse]
    """By stage; empty where ``metrics.jsonl`` is missing."""
    records: dict[str, EvaluationRecord]
    """By stage, in the order of the stages."""
    spent: dict[str, dict[str, Any]]
    """The ledger's entries by stage."""
    made_with: dict[str, list[dict[str, Any]]]
    """By stage."""
    data: dict[str, Manifest]
    """What was prepared, by folder: ``data`` and ``sft``."""
    distilled: dict[str, dict[str, Any]]
    """What ``benthic distil`` says of sources that were fine-tuned on, as far as they are still there."""
    brought: dict[str, Any]
    """What the checkpoint that the run begins with says of itself."""
    damaged: list[str] = field(default_factory=list)
    """A line for everything that is there and cannot be read."""

    def figures(self) -> dict[str, Any]:
        """What ``benthic report --json`` prints."""
        return {
            "stages": [{**one._asdict(), "state": one.state} for one in self.progress],
            "evaluation": {name: record.model_dump(mode="json")["scores"] for name, record in self.records.items()},
            "acceptance": {name: record.model_dump(mode="json")["acceptance"] for name, record in self.records.items()},
            "ledger": self.spent,
            "damaged": self.damaged,
        }

    @property
    def total(self) -> dict[str, float]:
        """Hours, energy and money of all stages together, as far as they are known."""
        keys = ("wall_hours", "device_hours", "energy_kwh", "cost_usd")
        known = {key: [number(entry.get(key)) for entry in self.spent.values()] for key in keys}
        return {key: sum(one for one in ones if one is not None) for key, ones in known.items() if any(
            one is not None for one in ones)}  # fmt: skip


def number(value: Any) -> float | None:
    """A number of a file, if it is one."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def refuse_no_run(path: Path) -> None:
    """Raise InputError if there is nothing here that a report could be of."""
    if not path.is_dir():
        raise InputError(
            f"{path}: {'not a directory' if path.exists() else 'no such directory'}; give a run's directory"
        )
    if not any((path / sign).is_file() for sign in SIGNS):
        raise InputError(f"{path}: holds none of {', '.join(SIGNS)}; give a run's directory")


def read_facts(run: Path, model: ModelConfig | None = None) -> Facts:
    """Read a run's directory, or any other, of which less is known.

    ``model`` are the sizes of its model where no ``config.toml`` says them.
    """
    damaged: list[str] = []

    def attempt(path: Path, read: Callable[[Path], _T]) -> _T | None:
        """What is read of a file that is there and whole."""
        if not path.is_file():
            return None
        try:
            return read(path)
        except (InputError, OSError, RecursionError) as error:
            damaged.append(" ".join(str(error).split()))
            return None

    config = attempt(run / "config.toml", load_run_config)
    course = attempt(run / "metrics.jsonl", read_course) or {}
    ledger = attempt(run / LEDGER, read_json_object) or {}
    records = [attempt(path, EvaluationRecord.load) for path in evaluations(run)]
    planned = stages(config) if config else ()
    order = [stage.name for stage in planned]
    found = sorted((one for one in records if one), key=lambda one: (_place(order, one.stage), one.stage))
    folders = {name: attempt(run / name / MANIFEST, lambda path: Manifest.load(path.parent)) for name in ("data", SFT)}
    return Facts(
        run=run,
        model=model or (config.model if config else None),
        config=config,
        settings=attempt(run / "config.toml", lambda path: path.read_text(encoding="utf-8", errors="replace")) or "",
        progress=_progress(planned, course),
        course=course,
        records={one.stage: one for one in found},
        spent=_by_stage(ledger.get("stages"), dict),
        made_with={
            stage: [one for one in several if isinstance(one, dict)]
            for stage, several in _by_stage(ledger.get("made_with"), list).items()
        },
        data={name: manifest for name, manifest in folders.items() if manifest},
        distilled=_distilled(folders[SFT]),
        brought=attempt(run / "checkpoints" / BASE / "step-0" / "state.json", read_json_object) or {},
        damaged=damaged,
    )


def _place(order: list[str], stage: str) -> int:
    return order.index(stage) if stage in order else len(order)


def _progress(planned: tuple[Stage, ...], course: dict[str, StageCourse]) -> list[Progress]:
    """Of the stages that are planned, and of those that are recorded nevertheless."""
    known = [
        Progress(stage.name, stage.kind, course[stage.name].steps if stage.name in course else 0, stage.steps or None)
        for stage in planned
        if stage.kind != "reward" or stage.name in course  # in a recipe of `benthic run`, it is no stage
    ]
    names = {one.name for one in known}
    return known + [Progress(name, "corpus", one.steps, None) for name, one in course.items() if name not in names]


def _distilled(conversations: Manifest | None) -> dict[str, dict[str, Any]]:
    sources = conversations.settings.get("sources") if conversations else None
    found: dict[str, dict[str, Any]] = {}
    for source in (one for one in sources if isinstance(one, str)) if isinstance(sources, list | tuple) else ():
        with suppress(InputError, OSError, ValueError):  # somebody else's folder may hold anything
            if (told := read_manifest(Path(source).parent)) is not None:
                found[source] = told
    return found


def _by_stage(entries: Any, kind: type) -> dict[str, Any]:
    if not isinstance(entries, dict):
        return {}
    return {str(name): entry for name, entry in entries.items() if isinstance(entry, kind)}
