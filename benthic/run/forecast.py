"""What each stage of a run will take: time, energy, money. For ``benthic run --dry-run``, and for the time left.

Steps of training are measured where a model fits this machine and that is asked for: a few of them, on a model that is
thrown away. All else is arithmetic: operations over the rate at which this machine does them in training. Such figures
are good for a plan, not for a promise; each says where it is from.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benthic.config.posttrain import RlConfig
from benthic.config.schema import RunConfig
from benthic.config.stages import Stage, stages
from benthic.data.corpus import text_bytes
from benthic.data.manifest import FILE_NAME, Manifest
from benthic.errors import InputError
from benthic.evaluate.retrieval import lengths_from
from benthic.files import read_json_object
from benthic.model import build_model
from benthic.plan.counts import main_model, mtp_modules
from benthic.plan.flops import forward_flops, training_flops
from benthic.plan.machine import measure_gemm_gflops
from benthic.plan.memory import refuse_too_large
from benthic.plan.power import cpu_name, watts_per_core
from benthic.posttrain.rollouts import Sampler
from benthic.precision.compute import Compute
from benthic.train.calibrate import parts_of_run
from benthic.train.ledger import FILE_NAME as LEDGER
from benthic.train.metrics import read_metrics
from benthic.train.schedule import steps_per_full_batch
from benthic.train.trial import RandomSequences, Trial, heaviest_mtp

How = Literal["as given", "measured", "by arithmetic", "not known before the data is there"]

_BYTES_A_SECOND = 1.5e6
"""Of text that is read, made a tokenizer of and encoded: two cores of a 2.1 GHz Xeon."""
_BYTES_A_TOKEN = 4
_SHARE_OF_PEAK = 0.6
"""Of the rate of a matrix product, that training reaches (docs/performance.md)."""
_STEPS = 2
"""That are timed."""
_PROMPT = 24
"""Tokens of a problem, where it is not known."""
_ANSWERS = 64
"""Answers that a step of learning from rewards is timed on."""
_EXPORT_BYTES_A_SECOND = 2e8
_REPORT_SECONDS = 5.0


@dataclass(frozen=True)
class Forecast:
    """Of one stage."""

    what: str
    """Is done in it."""
    seconds: float | None
    how: How
    devices: int = 1
    """That work on it at the same time."""

    @property
    def kwh(self) -> float:
        """Estimated from the processor's design power; see docs/health.md for what that leaves out."""
        return self._device_hours * torch.get_num_threads() * watts_per_core(cpu_name()) / 1000

    def cost(self, price_per_hour: float | None) -> float | None:
        """Dollars, where the price of a device is given."""
        return None if price_per_hour is None else self._device_hours * price_per_hour

    @property
    def _device_hours(self) -> float:
        return (self.seconds or 0.0) / 3600 * self.devices


def forecasts(config: RunConfig, out: Path, *, measure: bool = False) -> dict[str, Forecast]:
    """By stage, for all that a run with these settings can have.

    Args:
        config: settings, resolved or not.
        out: the directory, which need not be there; what is prepared in it, and what its stages took, is made use of.
        measure: take steps of training, which takes some seconds; by default all is arithmetic.

    Raises:
        InputError: sources of text cannot be found.
    """
    return _Forecaster(config, out, measure).all()


class _Forecaster:
    def __init__(self, config: RunConfig, out: Path, measure: bool) -> None:
        self._config, self._out = config, out
        self._stages = stages(config)
        self._measure = measure and _fits(config)
        self._prepared = Manifest.load(out / "data") if (out / "data" / FILE_NAME).is_file() else None
        self._rate = _rate_of(out) or _SHARE_OF_PEAK * 1e9 * measure_gemm_gflops()
        self._compute: Compute | None = None

    def all(self) -> dict[str, Forecast]:
        found = {"data": self._data()}
        for stage in self._stages:
            if stage.kind != "base":
                found[stage.name] = self._training(stage)
        return {**found, "evaluation": self._evaluation(), "export": self._export(), "report": _REPORT}

    def _data(self) -> Forecast:
        if self._config.posttrain.base is not None:
            return Forecast(f"the model of {self._config.posttrain.base}", 1.0, "by arithmetic")
        size = text_bytes(self._config.data.sources)
        seconds = 0.0 if self._prepared else size / _BYTES_A_SECOND
        return Forecast(f"{size / 1e6:,.1f} MB of {', '.join(self._config.data.sources)}", seconds, "by arithmetic")

    # ------------------------------------------------------------------ training

    def _training(self, stage: Stage) -> Forecast:
        train, rl = stage.config.train, self._config.posttrain.rl
        if stage.kind == "rl" and rl is not None:
            return self._rl(stage, rl)
        shape = f"{train.batch_size} x {train.sequence_length} tokens"
        last = self._forward(self._held_out_tokens(), train.sequence_length)
        if train.minutes is not None:
            self._measured(stage)  # for the rate
            return Forecast(f"{train.minutes:g} minutes of {shape}", 60 * train.minutes + last, "as given")
        if train.steps is None:
            return Forecast(f"epochs of {shape}", None, "not known before the data is there")
        step = self._measured(stage)
        how: How = "measured" if step else "by arithmetic"
        flops = train.batch_size * train.sequence_length * _flops_per_token(stage.config)
        steps = train.steps / steps_per_full_batch(train.schedule)
        during = train.steps // train.validate_every * self._forward(train.validation_tokens, train.sequence_length)
        # Several processes pretrain, and are taken to share the work without loss.
        devices = self._config.parallel.processes if stage.kind == "corpus" else 1
        seconds = steps * (step or flops / self._rate) + during + last * (2 if stage.kind == "sft" else 1)
        return Forecast(f"{train.steps:,} steps of {shape}", seconds / devices, how, devices)

    def _measured(self, stage: Stage) -> float | None:
        """Seconds of a step; the first stage's also say how fast this machine is, and in which precision."""
        if not self._measure:
            return None
        config = stage.config
        asked = config.precision.compute
        modes: tuple[Compute, ...] = (self._compute,) if self._compute else ("fp32", "bf16")
        modes = modes if asked == "auto" else (asked,)
        timed: dict[Compute, float] = {mode: _seconds_per_step(config, mode) for mode in modes}
        fastest = min(timed, key=timed.__getitem__)
        if self._compute is None:
            self._compute, train = fastest, config.train
            self._rate = train.batch_size * train.sequence_length * _flops_per_token(config) / timed[fastest]
        return timed[fastest]

    def _rl(self, stage: Stage, rl: RlConfig) -> Forecast:
        answers, length = rl.prompts * rl.group_size, _PROMPT + rl.max_new_tokens
        passes = 1 / rl.updates * (1 + bool(rl.kl_weight)) / 3
        one = training_flops(stage.config.model, length, mtp=bool(heaviest_mtp(stage.config))) * length
        step = answers * one * (1 + passes) / self._rate
        if self._measure:
            step = self._measured_rl(stage, rl, length)
        every = stage.config.train.validate_every
        asked = len(rl.problems) * (2 * rl.held_out + max(0, rl.steps // every - 1) * rl.held_out_quick)
        judged = 2 * self._forward(asked * length, length) + 2 * self._forward(self._held_out_tokens(), length)
        what = f"{rl.steps:,} steps of {answers} answers, of at most {rl.max_new_tokens} tokens"
        return Forecast(what, rl.steps * step + judged, "measured" if self._measure else "by arithmetic")

    def _measured_rl(self, stage: Stage, rl: RlConfig, length: int) -> float:
        """Of a step whose answers are all as long as may be: by a model that knows nothing."""
        few = min(_ANSWERS, rl.prompts * rl.group_size)
        train = stage.config.train.model_copy(
            update={"batch_size": few, "micro_batch_size": few, "sequence_length": length}
        )
        config = stage.config.model_copy(update={"train": train})
        learning = _seconds_per_step(config, rl.compute)
        sampler = Sampler(build_model(config.model, seed=0), [0], at_once=rl.at_once)
        prompts = RandomSequences(config).at(0, max(1, few // rl.group_size)).tokens_BS[:, :_PROMPT].tolist()
        copies = few // len(prompts)
        begun = time.perf_counter()
        sampler.sample(prompts, range(len(prompts) * copies), copies=copies, max_new_tokens=rl.max_new_tokens)
        sampling = time.perf_counter() - begun
        return (learning + sampling / rl.updates) * rl.prompts * rl.group_size / few

    # ------------------------------------------------------------------ what comes after

    def _evaluation(self) -> Forecast:
        config = self._config
        length, rl = self._stages[0].config.train.sequence_length, config.posttrain.rl
        tokens = self._held_out_tokens() * (2 if config.posttrain.sft else 1)
        tasks = len(config.evaluation.tasks)
        if rl is not None:
            tokens += len(rl.problems) * rl.held_out * (_PROMPT + rl.max_new_tokens)
            tasks += len(rl.problems)
        if config.train.extend:
            long = lengths_from(length)
            tokens += config.evaluation.sequences * (long[-1] + length) + config.evaluation.retrieval * sum(long)
        models = len(self._stages)
        seconds = models * self._forward(tokens, length)
        return Forecast(f"{models} models, {tasks} tasks", seconds, "by arithmetic")

    def _export(self) -> Forecast:
        model = self._stages[-1].config.model
        size = 4 * (main_model(model).total + mtp_modules(model).total)
        return Forecast(f"{size / 1e6:,.0f} MB in Hugging Face layout", size / _EXPORT_BYTES_A_SECOND, "by arithmetic")

    def _held_out_tokens(self) -> int:
        if self._prepared is not None:
            return self._prepared.val_tokens
        if self._config.posttrain.base is not None:
            return self._config.train.validation_tokens
        data = self._config.data
        return round(data.validation_fraction * text_bytes(data.sources) / _BYTES_A_TOKEN)

    def _forward(self, tokens: int, length: int) -> float:
        """Seconds of reading so many tokens."""
        return tokens * forward_flops(self._config.model, length) / self._rate


_REPORT = Forecast("one page, and the model card", _REPORT_SECONDS, "by arithmetic")


def seconds_of(found: Mapping[str, Forecast]) -> dict[str, float]:
    """By stage, where it is known."""
    return {name: one.seconds for name, one in found.items() if one.seconds is not None}


def _seconds_per_step(config: RunConfig, compute: Compute) -> float:
    """Of very few steps, after one that allocates: less sure than what a run is begun with, and sooner told."""
    trial = Trial(config, RandomSequences(config), compute)
    trial.step()
    found = 0.0
    for weight, share in parts_of_run(config.train.schedule):
        begun = time.perf_counter()
        for _ in range(_STEPS):
            trial.step(weight)
        found += share * (time.perf_counter() - begun) / _STEPS
    return found


def _flops_per_token(config: RunConfig) -> float:
    """Of training, on average: MTP modules that have no weight do not run."""
    return sum(
        share * training_flops(config.model, config.train.sequence_length, mtp=bool(weight))
        for weight, share in parts_of_run(config.train.schedule)
    )


def _fits(config: RunConfig) -> bool:
    try:
        refuse_too_large(config.model)
    except InputError:
        return False
    return True


def _rate_of(out: Path) -> float | None:
    """Operations a second of the steps of training that a run has behind it."""
    ledger = read_json_object(out / LEDGER).get("stages", {}) if (out / LEDGER).is_file() else {}
    flops = {
        name: entry["flops"]
        for name, entry in ledger.items()
        if name == "sft" or name.startswith(("pretrain", "extend"))
    }
    rows = read_metrics(out / "metrics.jsonl") if flops else []
    seconds = sum(row["seconds"] for row in rows if row.get("stage") in flops and "seconds" in row)
    return sum(flops.values()) / seconds if seconds else None
