"""Pretraining from the first step to the last, whatever interrupts it: the same call again goes on where it stopped."""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benthic.config.load import dump_toml
from benthic.config.schema import RunConfig
from benthic.data.batches import Batch, Batches
from benthic.data.shards import TokenStore
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError, WorkFailed
from benthic.files import sha256, write_atomically
from benthic.model import LanguageModel
from benthic.ops import native
from benthic.plan.flops import training_flops
from benthic.plan.machine import measure_gemm_gflops
from benthic.precision.compute import Compute, compute_dtype
from benthic.train.calibrate import resolve
from benthic.train.checkpoint import latest, load, save
from benthic.train.identity import identity, resume_settings
from benthic.train.ledger import Ledger
from benthic.train.memory import keep_freed_memory
from benthic.train.metrics import MetricsLog
from benthic.train.progress import Progress, describe, open_progress
from benthic.train.schedule import Course, StepSettings
from benthic.train.signals import Interrupted, StopRequest
from benthic.train.state import TrainState
from benthic.train.step import StepReport, train_step
from benthic.train.validate import bits_per_byte

STAGE = "pretrain"
_MOST_SKIPPED = 3


class Diverged(WorkFailed):
    """Loss or gradients were not finite several times in a row."""


class Trained(NamedTuple):
    """The outcome of a run."""

    model: LanguageModel
    """With the averaged weights, where an average is kept."""
    config: RunConfig
    """As resolved."""
    bits_per_byte: float
    """Of the whole validation split."""


def train(config: RunConfig, out: str | Path) -> Trained:
    """Pretrain a model on the data prepared in ``out``, or go on with the training begun there.

    What ``config.data`` says of how data is prepared gives way to what the data in ``out`` was prepared with.
    Writes ``config.toml``, ``metrics.jsonl``, ``ledger.json`` and ``checkpoints/pretrain/step-N`` into ``out``.

    Raises:
        InputError: there is no data, a checkpoint is damaged, or was made with other settings.
        Diverged: the loss was not finite three times in a row.
        CheckpointFailed: a checkpoint could not be written.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved first.
    """
    keep_freed_memory()
    out = Path(out)
    store = TokenStore(out / "data", "train")
    config = config.model_copy(update={"data": store.manifest.prepared(config.data)})
    corpus = _identify_corpus(config, out, store)
    batches = Batches(
        store,
        config.train.sequence_length,
        1 + config.model.num_nextn_predict_layers,
        seed=config.train.seed,
        mask_documents=config.data.mask_documents,
    )
    newest = latest(out / "checkpoints" / STAGE)
    checkpoint = load(newest) if newest else None
    if checkpoint is None:
        resolved = resolve(config, batches)
        run = identity(config, resolved, corpus)
    else:
        run = checkpoint.state.get("run", {})
        resolved = resume_settings(config, run, corpus, str(newest))
    trainer = _Trainer(resolved, out, batches, run)
    if checkpoint is not None:
        trainer.state.restore(checkpoint, str(newest))
    del checkpoint
    write_atomically(out / "config.toml", dump_toml(resolved))
    return trainer.run()


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
    """The loop's parts held together; ``config`` is resolved."""

    def __init__(self, config: RunConfig, out: Path, batches: Batches, identity: dict[str, Any]) -> None:
        assert config.train.steps is not None
        assert config.precision.compute != "auto"
        self.config, self.out, self.batches, self.identity = config, out, batches, identity
        self.steps = config.train.steps
        self.compute: Compute = config.precision.compute
        self.micro_batch_size = config.train.micro_batch_size or config.train.batch_size
        self.state = TrainState(config)
        self.course = Course(
            config.train.schedule, self.steps, config.train.batch_size, config.train.micro_batch_size or 1
        )
        self.flops_per_token = training_flops(config.model, config.train.sequence_length, mtp=True)
        self.peak_flops = 1e9 * measure_gemm_gflops(compute_dtype(self.compute))
        self.held_out = TokenStore(out / "data", "val")
        self.ledger = Ledger(out, STAGE)
        self.skipped = 0
        """Steps in a row that were not taken because something was not finite."""

    def run(self) -> Trained:
        """Train to the end, or until asked to stop."""
        state = self.state
        with (
            StopRequest() as stop,
            MetricsLog(self.out / "metrics.jsonl", state.step) as metrics,
            open_progress(STAGE, self.steps) as progress,
        ):
            sources = ", ".join(self.config.data.sources)
            progress.note(
                f"{self.steps} steps over {sources} in {self.compute}, {torch.get_num_threads()} threads, "
                f"{native.status()}"
            )
            while state.step < self.steps:
                self._step(metrics, progress)
                if state.step % self.config.train.validate_every == 0 or state.step == self.steps:
                    self._validate(metrics, progress)
                due = state.step % self.config.train.checkpoint_every == 0 or state.step == self.steps
                if due or stop.signal is not None:
                    self._save(metrics)
                if stop.signal is not None:
                    raise Interrupted(stop.signal, f"stopped after step {state.step}, saved in {self.out}")
        if state.average is not None:
            state.average.move_into_model()
        assert state.bits_per_byte is not None
        return Trained(state.model, self.config, state.bits_per_byte)

    def _step(self, metrics: MetricsLog, progress: Progress) -> None:
        start = time.perf_counter()
        settings = self.course.at(self.state.step)
        batch = self.batches.at(settings.first_sequence, settings.batch_size)
        report = train_step(
            self.state.objective,
            self.state.optimizer,
            batch,
            settings,
            micro_batch_size=self.micro_batch_size,
            compute=self.compute,
        )
        if report.updated and self.state.average is not None:
            self.state.average.update()
        self.state.step += 1
        row = self._row(report, settings, time.perf_counter() - start)
        metrics.write(row)
        tokens_left = (self.course.sequences * self.config.train.sequence_length) - row["tokens"]
        progress.update(self.state.step, describe(row, self.state.bits_per_byte, tokens_left))
        self._guard(report, settings, batch, metrics)

    def _row(self, report: StepReport, settings: StepSettings, seconds: float) -> dict[str, Any]:
        length = self.config.train.sequence_length
        tokens = settings.batch_size * length
        load_ME = report.load_ME.float()
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
            "share_of_gemm_peak": tokens * self.flops_per_token / seconds / self.peak_flops,
            "expert_load_max_over_mean": (load_ME.amax(1) / load_ME.mean(1)).tolist(),
            "dead_experts": int((load_ME == 0).sum()),
            "seconds": seconds,
        }

    def _guard(self, report: StepReport, settings: StepSettings, batch: Batch, metrics: MetricsLog) -> None:
        """Record a step that was not taken; give up after several in a row."""
        if report.updated:
            self.skipped = 0
            return
        self.skipped += 1
        finite_loss = all(math.isfinite(loss) for loss in (*report.cross_entropy, report.balance))
        what = "gradient" if finite_loss else "loss"
        last = settings.first_sequence + len(batch.tokens_BS) - 1
        metrics.write(
            {
                "step": self.state.step,
                "event": "update skipped",
                "reason": f"{what} not finite",
                "sequences": [settings.first_sequence, last],
            }
        )
        if self.skipped == _MOST_SKIPPED:
            raise Diverged(
                f"step {self.state.step}: {what} not finite {_MOST_SKIPPED} times in a row, last in "
                f"sequences {settings.first_sequence} to {last}; try a lower learning rate"
            )

    def _validate(self, metrics: MetricsLog, progress: Progress) -> None:
        """Measure bits per byte: on a part of the split during the run, on all of it, and in fp32, at the end."""
        limit = None if self.state.step == self.steps else self.config.train.validation_tokens
        self.state.bits_per_byte = self._bits_per_byte(limit)
        row = {"step": self.state.step, "validation_bits_per_byte": self.state.bits_per_byte}
        if self.state.average is not None:
            with self.state.average.applied():
                self.state.bits_per_byte = row["average_validation_bits_per_byte"] = self._bits_per_byte(limit)
        metrics.write(row)
        progress.note(f"step {self.state.step}: validation {self.state.bits_per_byte:.4f} bits per byte")

    def _bits_per_byte(self, max_tokens: int | None) -> float:
        return bits_per_byte(
            self.state.model,
            self.held_out,
            sequence_length=self.config.train.sequence_length,
            batch_size=self.micro_batch_size,
            compute="fp32" if max_tokens is None else self.compute,
            mask_documents=self.config.data.mask_documents,
            max_tokens=max_tokens,
        )

    def _save(self, metrics: MetricsLog) -> None:
        metrics.sync()
        tokens = self.course.sequences_before(self.state.step) * self.config.train.sequence_length
        self.ledger.write(tokens, tokens * self.flops_per_token)
        save(
            self.out / "checkpoints" / STAGE,
            self.state.step,
            self.state.to_checkpoint(self.identity),
            self.config.train.keep_checkpoints,
        )
