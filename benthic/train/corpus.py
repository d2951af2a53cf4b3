"""Stages that learn from text as it is: pretraining and context extension."""

from pathlib import Path
from typing import Any

from benthic.config.schema import RunConfig
from benthic.data.batches import Batch, Batches
from benthic.data.shards import TokenStore
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.files import sha256
from benthic.precision.compute import Compute
from benthic.train.architecture import Architecture
from benthic.train.objective import Losses, Objective
from benthic.train.probe import probe
from benthic.train.schedule import Course, StepSettings
from benthic.train.state import NOTHING, Carried, TrainState
from benthic.train.step import accumulate_gradients
from benthic.train.validate import bits_per_byte
from benthic.train.work import Place, Spent, Validation


class Corpus:
    """The data prepared in a run's directory."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._store = TokenStore(out / "data", "train")

    def prepare(self, config: RunConfig) -> tuple[RunConfig, dict[str, str]]:
        """What the settings say of how data is prepared gives way to what this data was prepared with."""
        config = config.model_copy(update={"data": self._store.manifest.prepared(config.data)})
        tokenizer = Tokenizer.load(self._out / "tokenizer").fingerprint
        if tokenizer != self._store.manifest.tokenizer_sha256:
            raise InputError(
                f"{self._out / 'tokenizer'}: not the tokenizer that {self._out / 'data'} was prepared with"
            )
        if self._store.manifest.vocab_size > config.model.vocab_size:
            raise InputError(
                f"model.vocab_size={config.model.vocab_size} must be at least {self._store.manifest.vocab_size}, the "
                f"vocabulary of {self._out / 'data'}: give --set "
                f"model.vocab_size={self._store.manifest.settings['vocab_size']}"
            )
        return config, {"data": sha256(self._out / "data" / "manifest.json"), "tokenizer": tokenizer}

    @property
    def held_out_tokens(self) -> int:
        """Tokens that are not learnt from."""
        return self._store.manifest.val.tokens

    def batches(self, config: RunConfig) -> Batches:
        """The sequences of a stage with these settings."""
        return Batches(
            self._store,
            config.train.sequence_length,
            1 + config.model.num_nextn_predict_layers,
            seed=config.train.seed,
            mask_documents=config.data.mask_documents,
        )

    def open(self, place: Place) -> "CorpusWork":
        """A stage over the training split."""
        return CorpusWork(place, self.batches(place.config), TokenStore(place.out / "data", "val"))


class SequenceCosts:
    """Tokens and operations of a stage whose sequences all have one length."""

    def __init__(self, config: RunConfig, architecture: Architecture, course: Course) -> None:
        self._length, self._course = config.train.sequence_length, course
        without_mtp, with_mtp = (
            architecture.training_flops(config.model, self._length, mtp=mtp) for mtp in (False, True)
        )
        self._flops_per_token, self._flops_per_token_of_mtp = without_mtp, with_mtp - without_mtp

    def spent(self, step: int) -> Spent:
        """By the first ``step`` steps."""
        tokens, with_mtp = (
            count(step) * self._length for count in (self._course.sequences_before, self._course.sequences_with_mtp)
        )
        return Spent(tokens, tokens * self._flops_per_token + with_mtp * self._flops_per_token_of_mtp)


class CorpusWork:
    """Next tokens and those after them, of packed documents."""

    measure = "bits per byte of held-out text"
    validates_first = False

    def __init__(self, place: Place, batches: Batches, held_out: TokenStore) -> None:
        self._config, self._batches, self._held_out = place.config, batches, held_out
        self._world = place.world
        self._compute = place.compute
        train = place.config.train
        self._reading: dict[str, Any] = {
            "sequence_length": train.sequence_length,
            "batch_size": train.micro_batch_size or train.batch_size,
            "mask_documents": place.config.data.mask_documents,
        }
        """How held-out text is read."""
        self.spent = SequenceCosts(place.config, place.architecture, place.course).spent

    def describe(self) -> str:
        """Length of sequences, and sources."""
        return f"{self._config.train.sequence_length} tokens a sequence over {', '.join(self._config.data.sources)}"

    def batch(self, state: TrainState, settings: StepSettings, first: int) -> Batch:
        """The sequences from ``first`` on, or this process's share of them."""
        rows = self._world.rows(settings.batch_size, self._reading["batch_size"])
        return self._batches.at(first + rows.start, len(rows))

    def gradients(
        self, objective: Objective, batch: Batch, settings: StepSettings, *, micro_batch_size: int, compute: Compute
    ) -> Losses:
        """Of the next tokens and those after them."""
        return accumulate_gradients(
            objective, batch, settings, micro_batch_size=micro_batch_size, compute=compute, world=self._world
        )

    def figures(self) -> dict[str, Any]:
        """None besides the usual ones."""
        return {}

    def validate(self, state: TrainState, *, last: bool) -> Validation:
        """Bits per byte: on a part of the split during the run, on all of it, and in fp32, at the end."""
        limit = None if last else self._config.train.validation_tokens
        compute: Compute = "fp32" if last else self._compute
        reading = {**self._reading, "compute": compute, "world": self._world}
        row = {}
        if state.average is not None:
            with state.average.applied(), self._world.evaluating(state.objective, compute):
                average = bits_per_byte(state.model, self._held_out, max_tokens=limit, **reading)
                row["average_validation_bits_per_byte"] = average
        with self._world.evaluating(state.objective, compute):
            found = bits_per_byte(state.model, self._held_out, max_tokens=limit, **reading)
            probed = probe(state.model, self._held_out, **reading)
        row = {"validation_bits_per_byte": found, **row}
        watched = row.get("average_validation_bits_per_byte", found)
        return Validation(watched, {**row, **probed._asdict()})

    def carry(self) -> Carried:
        """Nothing: a batch is found by its number."""
        return NOTHING

    def restore(self, carried: Carried, source: str) -> None:
        """Raises InputError if there is something."""
        if carried != NOTHING:
            raise InputError(f"{source}: holds what a stage of another kind carries")
