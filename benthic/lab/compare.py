"""Trainings side by side: one recipe, one corpus, each run made once and resumed where it stopped.

A study is a directory: ``data/`` and ``tokenizer/`` shared by all runs, a folder for each run, and a JSON file for
each answer that must not change between two calls (such as how long a step takes). Time is the processor time of
training steps, all threads together, which other programs at work disturb less than they do the clock; give OpenMP one
thread, or waiting counts too.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benthic.config.load import load_run_config
from benthic.config.schema import RunConfig
from benthic.config.stages import pretraining_alone
from benthic.data.batches import Batches, training_batches
from benthic.data.prepare import prepare
from benthic.data.shards import TokenStore
from benthic.errors import InputError
from benthic.files import read_json_object, write_atomically
from benthic.train.architecture import DEEPSEEK_V3, Architecture
from benthic.train.calibrate import parts_of_run, resolve
from benthic.train.identity import differences
from benthic.train.loop import train
from benthic.train.metrics import read_metrics
from benthic.train.trial import Trial

_ROUNDS = 15
"""Steps of each variant that are timed, in turn."""


def study_parser(doc: str | None) -> argparse.ArgumentParser:
    """Of a script: the directory, ``--seeds``, and ``--set KEY=VALUE`` for all runs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    return parser


def positive(text: str) -> int:
    """An option's number of something."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 1")
    return int(text)


class Variant(NamedTuple):
    """One side of a comparison."""

    name: str
    settings: tuple[str, ...] = ()
    """KEY=VALUE, over the study's."""
    architecture: Architecture = DEEPSEEK_V3

    def but(self, *settings: str, name: str | None = None) -> "Variant":
        """The same with further settings."""
        return self._replace(name=name or self.name, settings=(*self.settings, *settings))

    def lasting(self, steps: int, validations: int = 1) -> "Variant":
        """The same for so many steps, with so many validations evenly among them."""
        return self.but(f"train.steps={steps}", f"train.validate_every={max(1, steps // validations)}")


class Outcome(NamedTuple):
    """What a finished run left."""

    rows: list[dict[str, Any]]
    """Of ``metrics.jsonl``."""
    bits_per_byte: float
    """Of the whole validation split."""

    def steps(self, key: str) -> list[Any]:
        """A figure of every step."""
        return [row[key] for row in self.rows if "loss" in row]

    @property
    def seconds(self) -> float:
        """Processor time of all steps."""
        return float(sum(self.steps("processor_seconds")))


KEPT_SHORT = ("train.checkpoint_every=250", "train.keep_checkpoints=1")
"""Settings of a study of many runs: little is lost where it is interrupted, and little lies about."""


class Study:
    """Runs of a recipe's pretraining in one directory. ``settings`` are KEY=VALUE over the recipe, for all runs."""

    def __init__(self, directory: Path, settings: Sequence[str] = (), recipe: str = "quickstart") -> None:
        self.directory, self.recipe, self.settings = directory, recipe, tuple(settings)
        config = pretraining_alone(load_run_config(recipe, self.settings))
        prepare(config.data, config.model.vocab_size, directory)
        if config.precision.compute == "auto":
            compute = self.once("precision", {"settings": self.settings}, lambda: self._fastest(config))
            self.settings = (*self.settings, f"precision.compute={compute}")

    def once(self, name: str, asked: dict[str, Any], answer: Callable[[], Any]) -> Any:
        """The answer in ``name``.json, found and written there if this is the first time.

        Raises:
            InputError: it was found for something else than is asked now.
        """
        path = self.directory / f"{name}.json"
        asked = json.loads(json.dumps(asked))
        if not path.exists():
            write_atomically(path, json.dumps({"asked": asked, "answer": answer()}, indent=1))
        kept = read_json_object(path)
        if kept.get("asked") != asked:
            raise InputError(f"{path}: was found for {kept.get('asked')}, not for {asked}; give another directory")
        return kept["answer"]

    def config(self, variant: Variant, *settings: str) -> RunConfig:
        """The recipe with the study's, the variant's and these settings, one over the other."""
        return pretraining_alone(load_run_config(self.recipe, (*self.settings, *variant.settings, *settings)))

    def compare(self, variants: Sequence[Variant], seeds: int) -> dict[Variant, list[Outcome]]:
        """Runs of each variant with the same seeds, as :meth:`run` makes them."""
        outcomes: dict[Variant, list[Outcome]] = {variant: [] for variant in variants}
        for seed in range(seeds):
            for variant in variants:
                outcomes[variant].append(self.run(variant, seed))
        return outcomes

    def write(self, name: str, sides: Mapping[Variant, dict[str, Any]]) -> None:
        """``NAME.json``: what is told of each side, under its name and with its settings."""
        entries = {variant.name: {"settings": variant.settings, **told} for variant, told in sides.items()}
        write_atomically(self.directory / f"{name}.json", json.dumps(entries, indent=1))

    def run(self, variant: Variant, seed: int) -> Outcome:
        """Train, or go on, or read what a finished run left. Its checkpoints are removed at the end.

        Raises:
            InputError: the folder holds a run with other settings.
        """
        out = self.directory / f"{variant.name}-{seed}"
        config = self.config(variant, f"train.seed={seed}")
        asked = {"config": config.model_dump(mode="json"), "architecture": variant.architecture.settings()}
        end = out / "outcome.json"
        if end.exists():
            return _finished(out, asked, read_json_object(end))
        out.mkdir(exist_ok=True)
        for part in ("data", "tokenizer"):
            if not (out / part).exists():
                (out / part).symlink_to((self.directory / part).resolve())
        trained = train(config, out, variant.architecture)
        write_atomically(end, json.dumps({**asked, "bits_per_byte": trained.bits_per_byte}))
        shutil.rmtree(out / "checkpoints")
        return Outcome(read_metrics(out / "metrics.jsonl"), trained.bits_per_byte)

    def step_seconds(self, variants: Sequence[Variant]) -> dict[str, float]:
        """Processor time of a step of each, measured in turn so that a disturbance falls on all alike.

        Medians; where the steps of a run's parts differ, each part counts by its share of the run.
        """
        asked = {
            variant.name: [*self.settings, *variant.settings, variant.architecture.settings()] for variant in variants
        }
        answer: dict[str, float] = self.once("step_seconds", asked, lambda: self._time_steps(variants))
        return answer

    def _time_steps(self, variants: Sequence[Variant]) -> dict[str, float]:
        trials = {variant.name: self._trial(variant) for variant in variants}
        parts = {variant.name: parts_of_run(self.config(variant).train.schedule) for variant in variants}
        return {
            name: sum(share * statistics.median(seconds[weight]) for weight, share in parts[name])
            for name, seconds in _in_turn(trials, parts).items()
        }

    def _trial(self, variant: Variant) -> Trial:
        config = self.config(variant)
        assert config.precision.compute != "auto"
        return Trial(config, self._batches(config), config.precision.compute, variant.architecture).warm_up()

    def _fastest(self, config: RunConfig) -> str:
        train_once = config.train.model_copy(update={"steps": 1, "minutes": None})
        asked = config.model_copy(update={"train": train_once})
        return resolve(asked, self._batches(asked)).precision.compute

    def _batches(self, config: RunConfig) -> Batches:
        return training_batches(config, TokenStore(self.directory / "data", "train"))


def _in_turn(
    trials: Mapping[str, Trial], parts: Mapping[str, Sequence[tuple[float, float]]]
) -> dict[str, dict[float, list[float]]]:
    """Processor time of single steps, by trial and weight of the MTP loss."""
    seconds: dict[str, dict[float, list[float]]] = {name: {weight: [] for weight, _ in parts[name]} for name in trials}
    for _ in range(_ROUNDS):
        for name, trial in trials.items():
            for weight, _ in parts[name]:
                start = time.process_time()
                trial.step(weight)
                seconds[name][weight].append(time.process_time() - start)
    return seconds


def _finished(out: Path, asked: dict[str, Any], kept: dict[str, Any]) -> Outcome:
    """What is left of a run, if it is the one that is asked for."""
    try:
        # A setting that came with a later version counts as its default.
        config = RunConfig.model_validate(kept["config"]).model_dump(mode="json")
        architecture, bits_per_byte = kept["architecture"], float(kept["bits_per_byte"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{out / 'outcome.json'}: cannot be used; delete {out} to make the run again") from error
    if changed := differences(asked, {"config": config, "architecture": architecture}):
        raise InputError(f"{out}: has a run with other settings: {'; '.join(changed)}; give another directory")
    return Outcome(read_metrics(out / "metrics.jsonl"), bits_per_byte)
