"""Training from the first step to the last, whatever interrupts it: the same call again goes on where it stopped.

A run is a list of stages (``benthic/config/stages.py``), and one loop runs any of them; what differs between them is
behind a small protocol (``benthic/train/work.py``). A stage begins with what the last checkpoint of the stage before
it holds, also in a run that was never interrupted.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from signal import SIGTERM
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benthic.config.load import dump_toml
from benthic.config.schema import RunConfig
from benthic.config.stages import Stage, stages
from benthic.errors import InputError
from benthic.files import write_atomically
from benthic.model import Trainable
from benthic.ops import native
from benthic.parallel.replay import KEY as EXPERT_LOAD
from benthic.parallel.world import ALONE, World
from benthic.plan.machine import measure_gemm_gflops
from benthic.precision.compute import compute_dtype
from benthic.train.architecture import DEEPSEEK_V3, Architecture
from benthic.train.calibrate import resolve
from benthic.train.checkpoint import latest, load, reached
from benthic.train.compute import refuse_stages_without_device, refuse_stages_without_tiles
from benthic.train.corpus import Corpus
from benthic.train.identity import identity, renewed, resume_settings
from benthic.train.incidents import (
    Diverged,
    action,
    describe_incident,
    give_up_on_skipping,
    incident_row,
    is_finite,
    refuse_weights_not_finite,
    roll_back_rows,
    roll_back_target,
)
from benthic.train.memory import settle_memory
from benthic.train.metrics import read_metrics
from benthic.train.pace import RECENT, Pace, PlanAgain, TimeGiven
from benthic.train.progress import Opener, Progress, clock, describe, open_progress
from benthic.train.records import Metrics, open_ledger, open_metrics, open_shown, open_writer
from benthic.train.schedule import Course, StepSettings
from benthic.train.signals import Interrupted, StopRequest
from benthic.train.state import TrainState, carried_in, weights_of
from benthic.train.step import StepReport, train_step
from benthic.train.track import require_trackers
from benthic.train.trial import Sequences
from benthic.train.work import Kind, Kinds, Place, Spent, Work

PRETRAINING: Kinds = {"corpus": Corpus}


class Trained(NamedTuple):
    """The outcome of a run."""

    model: Trainable
    """With the averaged weights, where an average is kept; whole on the main process, a part on others."""
    config: RunConfig
    """As resolved."""
    bits_per_byte: float
    """Of the whole validation split of the last stage."""
    measure: str
    """What that is of: ``bits per byte of held-out text``."""


def train(
    config: RunConfig,
    out: str | Path,
    architecture: Architecture = DEEPSEEK_V3,
    kinds: Kinds = PRETRAINING,
    world: World = ALONE,
    show: Opener = open_progress,
) -> Trained:
    """Run the stages of training on what is prepared in ``out``, or go on with the training begun there.

    ``architecture`` is the kind of model, for those that ``config.model`` does not describe; ``kinds`` are the kinds of
    stages that are run: the others are left out. All processes of ``world`` call it alike; the main one writes.
    ``show`` is what people see of a stage.
    Writes ``config.toml``, ``metrics.jsonl``, ``ledger.json`` and ``checkpoints/STAGE/step-N`` into ``out``.

    Raises:
        InputError: there is no data, a checkpoint is damaged, or was made with other settings.
        MissingExtra: a tracker's library is not installed.
        Diverged: three updates in a row were not taken, or roll-backs were of no use.
        CheckpointFailed: a checkpoint could not be written.
        CopiesDiffer: processes that should hold the same numbers do not.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved first.
    """
    require_trackers(config.train.track)
    settle_memory()
    refuse_stages_without_tiles(_stages(config, kinds))
    refuse_stages_without_device(_stages(config, kinds))
    out = Path(out)
    known = {kind: kinds[kind](out) for kind in _kinds_of(config, kinds)}
    hashes: dict[str, str] = {}
    for one in known.values():
        config, found = one.prepare(config)
        hashes |= found
    planned = _stages(config, kinds)
    _refuse_to_spread(planned, world)
    names = [stage.name for stage in planned]
    _refuse_to_forget(out, names)
    number, newest = reached(out / "checkpoints", names)
    if planned[number].kind == "base":
        if newest is None:
            raise InputError(f"{out}: holds no weights of {config.posttrain.base} to begin with")
        number, newest = 1, None

    def go(resolved: RunConfig, run: dict[str, Any], given: TimeGiven) -> Trained:
        assert resolved.precision.compute != "auto"
        dtype = compute_dtype(resolved.precision.compute)
        peak = 1e9 * measure_gemm_gflops(dtype, resolved.train.device) * world.processes
        whole = _Run(resolved, _stages(resolved, kinds), out, known, run, architecture, peak, given, world, show)
        with world.watched(out):
            return _train(whole, number, newest)

    if newest is not None:
        run, kind = load(newest, groups=()).state.get("run", {}), planned[number].kind
        resolved = resume_settings(config, run, hashes, str(newest), architecture.settings(), kind=kind)
        return go(resolved, renewed(run, config, hashes), TimeGiven(None))
    corpus, batches, held_out = known.get("corpus"), None, None
    if isinstance(corpus, Corpus):
        batches, held_out = corpus.batches(planned[number].config), corpus.held_out_tokens
    given = TimeGiven(config.train.minutes, held_out)
    resolved = _measured_by_one(config, batches, architecture, held_out, world)
    while True:
        try:
            return go(resolved, identity(config, resolved, hashes, architecture.settings()), given)
        except PlanAgain as again:
            steps = {"steps": again.steps, "minutes": None}
        # What the precision was, it remains; the share of the average depends on the steps.
        train_more = config.train.model_copy(update=steps)
        resolved = resolve(config.model_copy(update={"train": train_more, "precision": resolved.precision}))
        measure_gemm_gflops.cache_clear()  # of when the machine was busy


def _measured_by_one(
    config: RunConfig, batches: Sequences | None, architecture: Architecture, held_out: int | None, world: World
) -> RunConfig:
    """Settings with what one process has measured for all."""
    return RunConfig.model_validate(
        world.first(lambda: resolve(config, batches, architecture, held_out).model_dump(mode="json"))
    )


def _train(run: "_Run", number: int, newest: Path | None) -> Trained:
    """From a stage on, and one of its checkpoints, or from the stage's beginning."""
    trainer = _Trainer(run, number, fresh=number == 0 and newest is None)
    trainer.begin(newest)
    run.world.first(lambda: write_atomically(run.out / "config.toml", dump_toml(run.config)))
    with StopRequest() as stop:
        run.world.listen(stop)
        try:
            trainer.train(stop)
        except PlanAgain:
            if stop.signal is not None:
                raise Interrupted(stop.signal, f"stopped before anything of {run.out} was saved") from None
            raise
        for later in range(number + 1, len(run.stages)):
            del trainer  # before the next stage takes as much memory
            trainer = _Trainer(run, later, fresh=False)
            trainer.begin()
            trainer.train(stop)
    return trainer.trained()


def _refuse_to_forget(out: Path, names: Iterable[str]) -> None:
    """A run that has gone beyond pretraining is not taken for one that has not."""
    for stage in ("base", "sft", "rl"):
        if stage not in names and (newest := latest(out / "checkpoints" / stage)):
            raise InputError(
                f"{newest}: is of a stage that is not asked for; give `benthic run` the recipe that has it, or another "
                "--out"
            )


def _refuse_to_spread(planned: Iterable[Stage], world: World) -> None:
    """Several processes pretrain; what comes after is for one."""
    later = next((stage.name for stage in planned if stage.kind not in (*PRETRAINING, "base")), None)
    if later and world.processes > 1:
        raise InputError(f"{later}: is for one process; start it without torchrun")


def _stages(config: RunConfig, kinds: Iterable[str]) -> list[Stage]:
    """The stages that are run, and the base that needs no running."""
    return [stage for stage in stages(config) if stage.kind == "base" or stage.kind in kinds]


def _kinds_of(config: RunConfig, kinds: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(stage.kind for stage in _stages(config, kinds) if stage.kind != "base"))


def _end_of(out: Path, stage: Stage) -> Path:
    """A finished stage's last checkpoint."""
    return out / "checkpoints" / stage.name / f"step-{stage.steps}"


def _weights_at_the_end(out: Path, stage: Stage | None) -> Mapping[str, Tensor]:
    assert stage is not None, "nothing was before the first stage"
    return weights_of(load(_end_of(out, stage), groups=("model", "average")))


class _Run(NamedTuple):
    """What all stages of a run share; ``config`` is resolved."""

    config: RunConfig
    stages: list[Stage]
    out: Path
    kinds: Mapping[str, Kind]
    identity: dict[str, Any]
    architecture: Architecture
    peak_flops: float
    """Operations a second of a matrix product here, on all processes together."""
    given: TimeGiven
    """For pretraining, if its steps were planned by time just now."""
    world: World
    show: Opener


class _Trainer:
    """The loop's parts held together for one stage of a run, counted from 0.

    ``fresh`` says whether its weights are drawn, for they come from no checkpoint.
    """

    def __init__(self, run: _Run, number: int, *, fresh: bool) -> None:
        *self.earlier, stage = run.stages[: number + 1]
        self.run, self.stage, self.config, self.world = run, stage, stage.config, run.world
        config, out = stage.config, run.out
        self.checkpoints = out / "checkpoints" / stage.name
        self.micro_batch_size = config.train.micro_batch_size or config.train.batch_size
        self.course = Course(
            config.train.schedule, stage.steps, config.train.batch_size, config.train.micro_batch_size or 1
        )
        self.state = TrainState(config, run.architecture, stage.adapter, run.world, fresh=fresh)
        # Nothing that holds this object may be held by it: it goes before the next stage takes as much memory.
        began_with = partial(_weights_at_the_end, out, self.earlier[-1] if self.earlier else None)
        self.place = Place(stage, out, run.architecture, self.course, began_with, run.world)
        self.writer = open_writer(self.checkpoints, run.world, self.state.shares)
        self.ledger = open_ledger(out, stage.name, config.train.price_per_hour, run.world)
        self.pace = Pace()

    def begin(self, source: Path | None = None) -> None:
        """Take over one of the stage's own checkpoints, or else what the stage before it ended with."""
        self.work: Work = self.run.kinds[self.stage.kind].open(self.place)
        if source is not None:
            checkpoint = self.state.load(source)
            self.state.restore(checkpoint, str(source))
            self.work.restore(carried_in(checkpoint, str(source)), str(source))
        elif self.earlier:
            last = _end_of(self.run.out, self.earlier[-1])
            self.state.begin_with(self.state.load(last, groups=("model", "average")), str(last))

    def trained(self) -> Trained:
        """What the stage has led to."""
        if self.state.average is not None:
            self.state.average.move_into_model()
        assert self.state.bits_per_byte is not None
        return Trained(self.state.whole_model(), self.run.config, self.state.bits_per_byte, self.work.measure)

    def train(self, stop: StopRequest) -> None:
        """Go to the end of the stage, or until asked to stop."""
        with (
            self.ledger,
            self.writer,
            open_shown(self.run.show, self.stage.name, self.stage.steps, self.world) as progress,
            self._open_metrics(progress.note) as metrics,
        ):
            progress.note(
                f"{self.stage.name}: {self.stage.steps} steps of {self.work.describe()} in {self.place.compute}, "
                f"{torch.get_num_threads()} threads, {self._kernels()}"
            )
            if self.state.step == 0 and self.work.validates_first:
                self._validate(metrics, progress)
            while self.state.step < self.stage.steps:
                self.writer.check()
                if self._step(metrics, progress):
                    self._end_step(metrics, progress, stop)
                    self._leave_if_time_is_wasted(progress)
            self.writer.wait()
        # One that came too late for the last step, during a validation of minutes maybe.
        if self.world.any(stop.signal is not None):
            raise Interrupted(stop.signal or SIGTERM, f"stopped after {self.stage.name}, saved in {self.run.out}")

    def _kernels(self) -> str:
        device = self.config.train.device
        return native.status() if device == "cpu" else f"PyTorch's operations on {device}"

    def _open_metrics(self, note: Callable[[str], None]) -> Metrics:
        earlier = {stage.name: stage.steps for stage in self.earlier}
        return open_metrics(self.run.out, self.stage.name, self.state.step, earlier, self.run.config, self.world, note)

    def _end_step(self, metrics: Metrics, progress: Progress, stop: StopRequest) -> None:
        """Validate and save where it is due; stop if asked to."""
        step, train = self.state.step, self.config.train
        signal = self.world.stopped_by(stop)
        if step % train.validate_every == 0 or step == self.stage.steps:
            self._validate(metrics, progress)
        due = step % train.checkpoint_every == 0 or step == self.stage.steps
        saves = due or signal is not None
        hash_every = self.config.parallel.hash_every
        if hash_every and (saves or step % hash_every == 0):
            self.state.compare_copies()
        if saves:
            self._save(metrics, on_schedule=due)
        if signal is not None:
            self.writer.wait()
            raise Interrupted(signal, f"stopped after step {step} of {self.stage.name}, saved in {self.run.out}")

    def _leave_if_time_is_wasted(self, progress: Progress) -> None:
        """Raises PlanAgain where the run, of which nothing is saved yet, is far shorter than it could be."""
        step = self.state.step
        if self.earlier or step % RECENT or step >= min(self.config.train.checkpoint_every, self.stage.steps):
            return
        seconds = self.work.spent(self.stage.steps).flops * self.pace.seconds_per_flop
        steps = self.run.given.steps_worth_beginning_again(self.config, seconds)  # minutes are for one process
        if steps is not None:
            progress.note(
                f"{self.stage.name}: begins again with {steps} steps: the {self.stage.steps} that were planned on a "
                f"slower machine would take {clock(seconds)}"
            )
            raise PlanAgain(steps)

    def _step(self, metrics: Metrics, progress: Progress) -> bool:
        """Take a step; False if it has led back to an earlier one."""
        start, start_of_work = time.perf_counter(), time.process_time() - self.writer.processor_seconds
        state, settings = self.state, self.course.at(self.state.step)
        before = self.work.spent(state.step)
        if self.config.train.schedule.mtp_from_last_layer and not self.earlier and self.course.begins_mtp(state.step):
            state.begin_mtp()
        first = settings.first_sequence + state.sequences_passed_over
        report = train_step(
            state.objective,
            state.optimizer,
            self.work.batch(state, settings, first),
            settings,
            micro_batch_size=self.micro_batch_size,
            compute=self.place.compute,
            health=state.health,
            gradients=self.work.gradients,
            world=self.world,
        )
        if report.updated and state.average is not None:
            state.average.update()
        state.step += 1
        row = self._row(report, settings, before, time.perf_counter() - start)
        row["processor_seconds"] = time.process_time() - self.writer.processor_seconds - start_of_work
        metrics.write(row)
        self.ledger.update(*self.work.spent(state.step))
        tokens_left = row["tokens"] * (self.course.sequences / self.course.sequences_before(state.step) - 1)
        progress.update(state.step, describe(row, state.bits_per_byte), tokens_left * self.pace.seconds_per_token)
        if report.incident is None:
            return True
        return self._respond(report, range(first, first + settings.batch_size), metrics, progress)

    def _respond(self, report: StepReport, sequences: range, metrics: Metrics, progress: Progress) -> bool:
        """Record an incident; False if the run has gone back because of it."""
        health = self.state.health
        row = incident_row(report, health, self.state.step, sequences)
        progress.note(describe_incident(row))
        if action(report, health) == "rolled back":
            self._roll_back(row, sequences.stop, metrics)
            return False
        metrics.write(row)
        give_up_on_skipping(row, health.skipped)
        return True

    def _roll_back(self, row: dict[str, Any], next_sequence: int, metrics: Metrics) -> None:
        """Become the last checkpoint, or the start, with all sequences before ``next_sequence`` passed over."""
        self.writer.wait()
        target = self.world.first(lambda: str(roll_back_target(self.checkpoints) or ""))
        if not target:
            del self.state  # before another takes as much memory
            self.state = TrainState(
                self.config, self.run.architecture, self.stage.adapter, self.world, fresh=not self.earlier
            )
            self.begin()
        else:
            self.begin(Path(target))
        self.state.sequences_passed_over = next_sequence - self.course.sequences_before(self.state.step)
        events = self.world.first(lambda: self._roll_back_rows(row))
        metrics.rewind(self.state.step)
        for event in events:
            metrics.write(event)

    def _roll_back_rows(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        earlier = read_metrics(self.run.out / "metrics.jsonl", self.stage.name)
        return roll_back_rows(row, earlier, self.state.step)

    def _row(self, report: StepReport, settings: StepSettings, before: Spent, seconds: float) -> dict[str, Any]:
        after = self.work.spent(self.state.step)
        spent = Spent(after.tokens - before.tokens, after.flops - before.flops)
        self.pace.add(seconds, spent)
        load_ME = report.load_ME.float()
        every = self.config.train.expert_load_every
        loads = {EXPERT_LOAD: report.load_ME.tolist()} if every and self.state.step % every == 0 else {}
        return {
            "step": self.state.step,
            "loss": report.cross_entropy[0],
            "mtp_losses": report.cross_entropy[1:],
            "balance_loss": report.balance,
            "grad_norm": report.grad_norm,
            "learning_rate": self.config.train.optimizer.learning_rate * settings.learning_rate_factor,
            "batch_size": settings.batch_size,
            "tokens": after.tokens,
            "tokens_per_s": spent.tokens / seconds,
            "share_of_gemm_peak": spent.flops / seconds / self.run.peak_flops,
            "expert_load_max_over_mean": (load_ME.amax(1) / load_ME.mean(1)).tolist(),
            "dead_experts": int((load_ME == 0).sum()),
            "seconds": seconds,
            **loads,
            **self.world.figures(),
            **self.work.figures(),
        }

    def _validate(self, metrics: Metrics, progress: Progress) -> None:
        """Judge the model as the stage's kind does."""
        found = self.work.validate(self.state, last=self.state.step in (0, self.stage.steps))
        self.state.bits_per_byte = found.bits_per_byte
        metrics.write({"step": self.state.step, **found.row})
        progress.note(f"step {self.state.step}: validation {found.bits_per_byte:.4f} bits per byte")
        refuse_weights_not_finite(self.state.step, found.bits_per_byte)

    def _save(self, metrics: Metrics, *, on_schedule: bool) -> None:
        if self.world.any(not is_finite(self.state.model)):
            raise Diverged(f"step {self.state.step}: weights are not finite; nothing of it is saved")
        metrics.sync()
        self.ledger.write()
        # A signal's checkpoint takes the place of none: a later roll-back may want the one before.
        keep = self.config.train.keep_checkpoints if on_schedule else None
        checkpoint = self.state.to_checkpoint(self.run.identity, self.work.carry(), on_schedule=on_schedule)
        self.writer.save(self.state.step, checkpoint, keep)
