"""Training from the first step to the last, whatever interrupts it: the same call again goes on where it stopped.

A run is a list of stages (``benthic/config/stages.py``), and one loop runs any of them: pretraining, then the phases
of context extension. A stage begins with what the last checkpoint of the stage before it holds, also in a run that
was never interrupted.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benthic.config.load import dump_toml
from benthic.config.schema import RunConfig
from benthic.config.stages import stages
from benthic.data.batches import Batches
from benthic.data.shards import TokenStore
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.files import sha256, write_atomically
from benthic.model import Trainable
from benthic.ops import native
from benthic.parallel.replay import KEY as EXPERT_LOAD
from benthic.plan.machine import measure_gemm_gflops
from benthic.precision.compute import Compute, compute_dtype
from benthic.train.architecture import DEEPSEEK_V3, Architecture
from benthic.train.background import BackgroundWriter
from benthic.train.calibrate import resolve
from benthic.train.checkpoint import Checkpoint, load, reached
from benthic.train.identity import identity, resume_settings
from benthic.train.incidents import (
    action,
    describe_incident,
    give_up_on_skipping,
    incident_row,
    refuse_weights_not_finite,
    roll_back_rows,
    roll_back_target,
)
from benthic.train.ledger import Ledger
from benthic.train.memory import settle_memory
from benthic.train.metrics import MetricsLog, read_metrics
from benthic.train.probe import probe
from benthic.train.progress import Progress, describe, open_progress
from benthic.train.schedule import Course, StepSettings
from benthic.train.signals import Interrupted, StopRequest
from benthic.train.state import TrainState
from benthic.train.step import StepReport, train_step
from benthic.train.track import open_trackers, require_trackers
from benthic.train.validate import bits_per_byte


class Trained(NamedTuple):
    """The outcome of a run."""

    model: Trainable
    """With the averaged weights, where an average is kept."""
    config: RunConfig
    """As resolved."""
    bits_per_byte: float
    """Of the whole validation split."""


def train(config: RunConfig, out: str | Path, architecture: Architecture = DEEPSEEK_V3) -> Trained:
    """Pretrain a model on the data prepared in ``out`` and extend its context, or go on with the training begun there.

    ``architecture`` is the kind of model, for those that ``config.model`` does not describe.
    What ``config.data`` says of how data is prepared gives way to what the data in ``out`` was prepared with.
    Writes ``config.toml``, ``metrics.jsonl``, ``ledger.json`` and ``checkpoints/STAGE/step-N`` into ``out``.

    Raises:
        InputError: there is no data, a checkpoint is damaged, or was made with other settings.
        MissingExtra: a tracker's library is not installed.
        Diverged: three updates in a row were not taken, or roll-backs were of no use.
        CheckpointFailed: a checkpoint could not be written.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved first.
    """
    require_trackers(config.train.track)
    settle_memory()
    out = Path(out)
    store = TokenStore(out / "data", "train")
    config = config.model_copy(update={"data": store.manifest.prepared(config.data)})
    corpus = _identify_corpus(config, out, store)
    number, newest = reached(out / "checkpoints", [stage.name for stage in stages(config)])
    checkpoint = load(newest) if newest else None
    if checkpoint is None:
        resolved = resolve(config, _batches(stages(config)[0].config, store), architecture)
        run = identity(config, resolved, corpus, architecture.settings())
    else:
        run = checkpoint.state.get("run", {})
        resolved = resume_settings(config, run, corpus, str(newest), architecture.settings())
    assert resolved.precision.compute != "auto"
    peak = 1e9 * measure_gemm_gflops(compute_dtype(resolved.precision.compute))
    whole = _Run(resolved, out, store, run, architecture, peak)
    trainer = _Trainer(whole, number)
    trainer.begin(checkpoint, str(newest))
    del checkpoint
    write_atomically(out / "config.toml", dump_toml(resolved))
    with StopRequest() as stop:
        trainer.train(stop)
        for later in range(number + 1, len(stages(resolved))):
            del trainer  # before the next stage takes as much memory
            trainer = _Trainer(whole, later)
            trainer.begin()
            trainer.train(stop)
    return trainer.trained()


class _Run(NamedTuple):
    """What all stages of a run share; ``config`` is resolved."""

    config: RunConfig
    out: Path
    store: TokenStore
    identity: dict[str, Any]
    architecture: Architecture
    peak_flops: float
    """Operations a second of a matrix product here."""


def _batches(config: RunConfig, store: TokenStore) -> Batches:
    """A stage's sequences."""
    return Batches(
        store,
        config.train.sequence_length,
        1 + config.model.num_nextn_predict_layers,
        seed=config.train.seed,
        mask_documents=config.data.mask_documents,
    )


def _identify_corpus(config: RunConfig, out: Path, store: TokenStore) -> dict[str, str]:
    """Hashes of data and tokenizer, once they are known to fit each other and the model."""
    tokenizer = Tokenizer.load(out / "tokenizer").fingerprint
    if tokenizer != store.manifest.tokenizer_sha256:
        raise InputError(f"{out / 'tokenizer'}: not the tokenizer that {out / 'data'} was prepared with")
    if store.manifest.vocab_size > config.model.vocab_size:
        raise InputError(
            f"model.vocab_size={config.model.vocab_size} must be at least {store.manifest.vocab_size}, the "
            f"vocabulary of {out / 'data'}: give --set model.vocab_size={store.manifest.settings['vocab_size']}"
        )
    return {"data": sha256(out / "data" / "manifest.json"), "tokenizer": tokenizer}


class _Trainer:
    """The loop's parts held together for one stage of a run, counted from 0."""

    def __init__(self, run: _Run, number: int) -> None:
        *self.earlier, stage = stages(run.config)[: number + 1]
        self.run, self.stage, self.config = run, stage.name, stage.config
        config, out = stage.config, run.out
        assert config.train.steps is not None
        assert config.precision.compute != "auto"
        self.batches = _batches(config, run.store)
        self.checkpoints = out / "checkpoints" / stage.name
        self.steps = config.train.steps
        self.compute: Compute = config.precision.compute
        self.micro_batch_size = config.train.micro_batch_size or config.train.batch_size
        self.state = TrainState(config, run.architecture)
        self.course = Course(
            config.train.schedule, self.steps, config.train.batch_size, config.train.micro_batch_size or 1
        )
        without_mtp, with_mtp = (
            run.architecture.training_flops(config.model, config.train.sequence_length, mtp=mtp)
            for mtp in (False, True)
        )
        self.flops_per_token, self.flops_per_token_of_mtp = without_mtp, with_mtp - without_mtp
        self.held_out = TokenStore(out / "data", "val")
        self.reading: dict[str, Any] = {
            "sequence_length": config.train.sequence_length,
            "batch_size": self.micro_batch_size,
            "compute": self.compute,
            "mask_documents": config.data.mask_documents,
        }
        """How held-out text is read."""
        self.writer = BackgroundWriter(self.checkpoints)
        self.ledger = Ledger(out, stage.name, price_per_hour=config.train.price_per_hour)

    def begin(self, checkpoint: Checkpoint | None = None, source: str = "") -> None:
        """Take over one of the stage's own checkpoints, or else what the stage before it ended with."""
        if checkpoint is not None:
            self.state.restore(checkpoint, source)
        elif self.earlier:
            ended, source = self._end_of_the_stage_before()
            self.state.begin_with(ended, source)

    def _end_of_the_stage_before(self) -> tuple[Checkpoint, str]:
        before = self.earlier[-1]
        last = self.run.out / "checkpoints" / before.name / f"step-{before.config.train.steps}"
        return load(last, groups=("model", "average")), str(last)

    def trained(self) -> Trained:
        """What the stage has led to."""
        if self.state.average is not None:
            self.state.average.move_into_model()
        assert self.state.bits_per_byte is not None
        return Trained(self.state.model, self.run.config, self.state.bits_per_byte)

    def train(self, stop: StopRequest) -> None:
        """Go to the end of the stage, or until asked to stop."""
        with (
            self.ledger,
            self.writer,
            self._open_metrics() as metrics,
            open_progress(self.stage, self.steps) as progress,
        ):
            sources, length = ", ".join(self.config.data.sources), self.config.train.sequence_length
            progress.note(
                f"{self.stage}: {self.steps} steps of {length} tokens a sequence over {sources} in {self.compute}, "
                f"{torch.get_num_threads()} threads, {native.status()}"
            )
            while self.state.step < self.steps:
                self.writer.check()
                if self._step(metrics, progress):
                    self._end_step(metrics, progress, stop)
            self.writer.wait()

    def _open_metrics(self) -> MetricsLog:
        earlier = {stage.name: stage.config.train.steps or 0 for stage in self.earlier}
        step, settings = self.state.step, self.run.config.model_dump(mode="json")
        trackers = open_trackers(self.config.train.track, self.run.out, sum(earlier.values()) + step, settings)
        return MetricsLog(self.run.out / "metrics.jsonl", self.stage, step, earlier=earlier, trackers=trackers)

    def _end_step(self, metrics: MetricsLog, progress: Progress, stop: StopRequest) -> None:
        """Validate and save where it is due; stop if asked to."""
        step, train = self.state.step, self.config.train
        if step % train.validate_every == 0 or step == self.steps:
            self._validate(metrics, progress)
        due = step % train.checkpoint_every == 0 or step == self.steps
        if due or stop.signal is not None:
            self._save(metrics, on_schedule=due)
        if stop.signal is not None:
            self.writer.wait()
            raise Interrupted(stop.signal, f"stopped after step {step} of {self.stage}, saved in {self.run.out}")

    def _step(self, metrics: MetricsLog, progress: Progress) -> bool:
        """Take a step; False if it has led back to an earlier one."""
        start, start_of_work = time.perf_counter(), time.process_time()
        state, settings = self.state, self.course.at(self.state.step)
        first = settings.first_sequence + state.sequences_passed_over
        report = train_step(
            state.objective,
            state.optimizer,
            self.batches.at(first, settings.batch_size),
            settings,
            micro_batch_size=self.micro_batch_size,
            compute=self.compute,
            health=state.health,
        )
        if report.updated and state.average is not None:
            state.average.update()
        state.step += 1
        row = self._row(report, settings, time.perf_counter() - start)
        row["processor_seconds"] = time.process_time() - start_of_work
        metrics.write(row)
        self.ledger.update(row["tokens"], self._flops_before(state.step))
        tokens_left = (self.course.sequences * self.config.train.sequence_length) - row["tokens"]
        progress.update(state.step, describe(row, state.bits_per_byte, tokens_left))
        if report.incident is None:
            return True
        return self._respond(report, range(first, first + settings.batch_size), metrics, progress)

    def _respond(self, report: StepReport, sequences: range, metrics: MetricsLog, progress: Progress) -> bool:
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

    def _roll_back(self, row: dict[str, Any], next_sequence: int, metrics: MetricsLog) -> None:
        """Become the last checkpoint, or the start, with all sequences before ``next_sequence`` passed over."""
        self.writer.wait()
        target = roll_back_target(self.checkpoints)
        if target is None:
            self.state = TrainState(self.config, self.run.architecture)
            self.begin()
        else:
            self.state.restore(load(target), str(target))
        self.state.sequences_passed_over = next_sequence - self.course.sequences_before(self.state.step)
        events = roll_back_rows(row, read_metrics(self.run.out / "metrics.jsonl", self.stage), self.state.step)
        metrics.rewind(self.state.step)
        for event in events:
            metrics.write(event)

    def _flops_before(self, step: int) -> float:
        """Operations of the stage's first ``step`` steps."""
        tokens, with_mtp = (
            count(step) * self.config.train.sequence_length
            for count in (self.course.sequences_before, self.course.sequences_with_mtp)
        )
        return tokens * self.flops_per_token + with_mtp * self.flops_per_token_of_mtp

    def _row(self, report: StepReport, settings: StepSettings, seconds: float) -> dict[str, Any]:
        length = self.config.train.sequence_length
        tokens = settings.batch_size * length
        flops = self._flops_before(self.state.step) - self._flops_before(self.state.step - 1)
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
            "tokens": self.course.sequences_before(self.state.step) * length,
            "tokens_per_s": tokens / seconds,
            "share_of_gemm_peak": flops / seconds / self.run.peak_flops,
            "expert_load_max_over_mean": (load_ME.amax(1) / load_ME.mean(1)).tolist(),
            "dead_experts": int((load_ME == 0).sum()),
            "seconds": seconds,
            **loads,
        }

    def _validate(self, metrics: MetricsLog, progress: Progress) -> None:
        """Measure bits per byte: on a part of the split during the run, on all of it, and in fp32, at the end."""
        last = self.state.step == self.steps
        limit = None if last else self.config.train.validation_tokens
        model, held_out = self.state.model, self.held_out
        reading = {**self.reading, "compute": "fp32" if last else self.compute}
        self.state.bits_per_byte = bits_per_byte(model, held_out, max_tokens=limit, **reading)
        row = {"step": self.state.step, "validation_bits_per_byte": self.state.bits_per_byte}
        if self.state.average is not None:
            with self.state.average.applied():
                self.state.bits_per_byte = bits_per_byte(model, held_out, max_tokens=limit, **reading)
                row["average_validation_bits_per_byte"] = self.state.bits_per_byte
        metrics.write({**row, **probe(model, held_out, **reading)._asdict()})
        progress.note(f"step {self.state.step}: validation {self.state.bits_per_byte:.4f} bits per byte")
        refuse_weights_not_finite(self.state.step, self.state.bits_per_byte)

    def _save(self, metrics: MetricsLog, *, on_schedule: bool) -> None:
        metrics.sync()
        self.ledger.write()
        # A signal's checkpoint takes the place of none: a later roll-back may want the one before.
        keep = self.config.train.keep_checkpoints if on_schedule else None
        self.writer.save(self.state.step, self.state.to_checkpoint(self.run.identity, on_schedule=on_schedule), keep)
