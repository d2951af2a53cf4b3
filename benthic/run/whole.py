"""Every stage of a run, one after another: ``benthic run``.

Data, pretraining, context extension, fine-tuning, reinforcement learning, evaluation, export, report. What is done is
not done again, so the same call after an interruption, or with stages that were left out before, goes on. Training or
preparing that fails ends the run; of what comes after training nothing needs another, so the rest of it is done.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benthic import torchrun
from benthic.api import KINDS, export_trained, prepare_posttraining, train_stages, write_report
from benthic.config.load import load_run_config
from benthic.config.schema import ParallelConfig, RunConfig
from benthic.config.stages import stages, without_extension
from benthic.data.manifest import FILE_NAME
from benthic.data.prepare import prepare
from benthic.errors import InputError, WorkFailed
from benthic.evaluate.records import EvaluationRecord
from benthic.lock import locked
from benthic.parallel.fits import refuse_misfit
from benthic.plan.memory import refuse_too_large
from benthic.posttrain.sft_data import FOLDER as SFT_FOLDER
from benthic.run.display import Display, StageProgress
from benthic.run.evaluation import FAILURES, evaluate_run, finished, records, remaining
from benthic.run.forecast import Forecast, forecasts, seconds_of
from benthic.train.checkpoint import latest
from benthic.train.compute import refuse_stages_without_device, refuse_stages_without_tiles
from benthic.train.ledger import Ledger
from benthic.train.loop import PRETRAINING, Trained
from benthic.train.work import Kinds

AFTER = ("evaluation", "export", "report")
"""What comes after training, in order."""
SKIPPABLE = ("data", "pretrain", "extend", "sft", "rl", *AFTER)


@dataclass(frozen=True)
class Plan:
    """What is to be done in a directory."""

    config: RunConfig
    """Without what is left out for good."""
    names: tuple[str, ...]
    """Of the stages, in order."""
    kinds: Kinds
    """Of the stages of training."""


class Row(NamedTuple):
    """Of what ``benthic run --dry-run`` shows."""

    name: str
    forecast: Forecast
    state: str
    """How far it has come: ``done``, or the step it has reached; empty if it has not begun."""


@dataclass
class Outcome:
    """How a run has ended."""

    bits_per_byte: float = 0.0
    """Of what the last stage of training validates on."""
    measure: str = ""
    """What that is of."""
    records: list[EvaluationRecord] = field(default_factory=list)
    """Of the stages of training, in order, as far as there are any."""
    remarks: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Stages after training that were not done to the end, each a line that says why."""


def plan(config: RunConfig, out: Path, skip: Iterable[str] = ()) -> Plan:
    """What is to be done of a recipe, without the stages in ``skip``.

    A stage that is finished and left out is kept, and those after it begin with it.

    Raises:
        InputError: there is no such stage, or it cannot be left out (any more).
    """
    skip = set(skip)
    for name in sorted(skip - set(SKIPPABLE)):
        raise InputError(f"--skip {name}: no such stage; allowed are {', '.join(SKIPPABLE)}")
    done = _finished(out)
    if config.posttrain.base is not None and torchrun.processes() > 1:
        raise InputError("several processes pretrain, but the run begins with a model; start it without torchrun")
    if "extend" in skip and not any(name.startswith("extend-") for name in done):
        config = without_extension(config)
    if "pretrain" in skip and config.posttrain.base is None and "pretrain" not in done:
        raise InputError(f"--skip pretrain: all else begins with it, and {out} holds none that is finished")
    kinds = dict(KINDS)
    for name in sorted(skip & {"sft", "rl"} - done):
        if latest(out / "checkpoints" / name) is not None:
            raise InputError(f"--skip {name}: {out} has begun it already; go on with it, or give another --out")
        kinds.pop(name)
    training = [stage.name for stage in stages(config) if stage.kind in kinds]
    _refuse_gaps(out, training)
    first = [] if "data" in skip else ["data"]
    return Plan(config, (*first, *training, *(name for name in AFTER if name not in skip)), kinds)


def rows(the: Plan, out: Path) -> list[Row]:
    """What each stage will take, with steps of training measured where its model fits this machine; writes nothing.

    Raises InputError if a source of text cannot be found.
    """
    found, done = forecasts(the.config, out, measure=True), _finished(out)
    if (out / "data" / FILE_NAME).is_file():
        done = done | {"data"}
    if done.issuperset(set(the.names) - set(AFTER)) and not remaining(out, load_run_config(out / "config.toml")):
        done = done | {"evaluation"}
    return [Row(name, found[name], _state(name, out, done)) for name in the.names]


def _state(name: str, out: Path, done: set[str]) -> str:
    newest = latest(out / "checkpoints" / name)
    if name in done or newest is None:
        return "done" if name in done else ""
    return f"goes on after {newest.name}"


def _finished(out: Path) -> set[str]:
    """Names of the stages of training that are finished."""
    if not (out / "config.toml").is_file():
        return set()
    return {stage.name for stage, _ in finished(out, load_run_config(out / "config.toml"))}


def _refuse_gaps(out: Path, training: list[str]) -> None:
    """A stage that was left out before later ones were trained cannot be put in before them."""
    begun = [latest(out / "checkpoints" / name) is not None for name in training]
    for place, name in enumerate(training):
        later = [other for other, is_begun in zip(training[place + 1 :], begun[place + 1 :], strict=True) if is_begun]
        if later and not begun[place]:
            raise InputError(
                f"{out}: {later[0]} was begun without {name}, which the recipe has; give --skip {name}, or another "
                "--out"
            )


def in_words(out: Path, outcome: Outcome) -> str:
    """What has become of a run, and what to do with it."""
    what = f"{outcome.bits_per_byte:.4f} {outcome.measure}"
    report = f"; all about it: {out / 'report.html'}" if (out / "report.html").is_file() else ""
    return f"{out}: {what}; to talk to it: benthic chat {out}{report}"


def run(the: Plan, out: Path) -> Outcome:
    """Do what is planned, as far as it is not done yet, with a display on standard error.

    Raises:
        InputError, WorkFailed, Interrupted: as the stages of preparing and training.
    """
    refuse_too_large(the.config.model)
    refuse_misfit(the.config, torchrun.processes())
    refuse_stages_without_tiles(stages(the.config))
    refuse_stages_without_device(stages(the.config))
    outcome = Outcome()
    with Display(the.names, lambda: _seconds(the, out)) as display:
        if "data" in the.names:
            with _account(the.config, out, display, "data") as progress:
                outcome.remarks += _prepare(the, out, progress)
            for remark in outcome.remarks:
                display.note(f"note: {remark}")
        trained = _train(the, out, display)
        outcome.bits_per_byte, outcome.measure = trained.bits_per_byte, trained.measure
        config = trained.config
        del trained  # its model takes memory
        works: dict[str, Callable[[StageProgress], None]] = {
            "evaluation": lambda progress: _evaluate(config, out, progress),
            "export": lambda progress: _export(out, progress),
            "report": lambda progress: _report(out, progress),
        }
        for name in AFTER:
            if name in the.names:
                try:
                    with _account(config, out, display, name) as progress:
                        works[name](progress)
                except FAILURES as error:
                    line = f"{name}: {' '.join(str(error).split()) or type(error).__name__}"
                    outcome.failed.append(line)
                    display.note(f"error: {line}")
        outcome.records = records(out, config)
    return outcome


def _seconds(the: Plan, out: Path) -> dict[str, float]:
    """What is still to be spent on each stage, as far as that is known; of one that has begun, all of it."""
    done = _finished(out)
    known = seconds_of(forecasts(the.config, out))
    return {name: 0.0 if name in done else seconds for name, seconds in known.items()}


def assist(the: Plan, out: Path) -> None:
    """What the other processes do that torchrun has started: pretraining and context extension, with the main one.

    All else is for one process, and done where ``out`` is known to be ready by its files: preparing text may take
    longer than processes wait for each other.
    """
    refuse_misfit(the.config, torchrun.processes())
    wanted = [out / "data" / FILE_NAME, *([out / SFT_FOLDER / FILE_NAME] if "sft" in the.names else [])]
    while "data" in the.names and not all(path.is_file() for path in wanted):
        time.sleep(1.0)
    if not _is_past_pretraining(out):
        train_stages(the.config, out, kinds=PRETRAINING)


def _is_past_pretraining(out: Path) -> bool:
    return any(latest(out / "checkpoints" / name) is not None for name in ("sft", "rl"))


def _train(the: Plan, out: Path, display: Display) -> Trained:
    """All stages of training; the first ones with all processes there are."""
    config, several = the.config, torchrun.processes() > 1
    if several and not _is_past_pretraining(out):
        train_stages(config, out, kinds=PRETRAINING, show=display.stage)
    if several:
        config = config.model_copy(update={"parallel": ParallelConfig()})
    return train_stages(config, out, kinds=the.kinds, show=display.stage, alone=several)


@contextmanager
def _account(config: RunConfig, out: Path, display: Display, name: str) -> Iterator[StageProgress]:
    """A stage that is no training, with its time in the ledger if it comes to its end."""
    with Ledger(out, name, price_per_hour=config.train.price_per_hour) as ledger:
        yield display.stage(name)
        ledger.update(0, 0.0)


def _prepare(the: Plan, out: Path, progress: StageProgress) -> list[str]:
    config, remarks = the.config, []
    if config.posttrain.base is None:
        remarks += prepare(config.data, config.model.vocab_size, out, progress.count).remarks()
    # What the later stages need is made first, so that they do not fail for want of it hours later.
    return remarks + prepare_posttraining(config, out, progress.count, kinds=the.kinds)


def _evaluate(config: RunConfig, out: Path, progress: StageProgress) -> None:
    def trouble(line: str) -> None:
        progress.note(f"error: evaluation: {line}")

    with locked(out):
        failed = evaluate_run(out, config, progress.count, trouble, progress.passed)
    if failed:
        raise WorkFailed(f"{failed} of its measures failed")


def _export(out: Path, progress: StageProgress) -> None:
    progress.count("the model in Hugging Face layout", 0, None)
    export_trained(out)


def _report(out: Path, progress: StageProgress) -> None:
    progress.count("a page of the whole run", 0, None)
    _, facts = write_report(out)
    for line in facts.damaged:
        progress.note(f"note: {line}")
