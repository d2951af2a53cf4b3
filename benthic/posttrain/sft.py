"""Supervised fine-tuning: the next tokens, and those after them, of answers alone (V3 report section 5.1)."""

from pathlib import Path
from typing import Any

from benthic.config.posttrain import SftConfig
from benthic.config.schema import RunConfig
from benthic.config.stages import stages
from benthic.data.batches import Batch
from benthic.data.manifest import FILE_NAME
from benthic.data.shards import TokenStore
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.files import sha256
from benthic.model import LanguageModel
from benthic.posttrain.packing import AnswerStore, PackedBatches, in_order
from benthic.posttrain.rehearsal import borrowed, open_rehearsal
from benthic.posttrain.sft_data import FOLDER, SAMPLES, prepare_sft, sft_sources
from benthic.precision.compute import Compute
from benthic.train.corpus import SequenceCosts
from benthic.train.objective import Losses, Objective
from benthic.train.probe import PROBED_TOKENS, probe_batches
from benthic.train.schedule import StepSettings
from benthic.train.state import NOTHING, Carried, TrainState
from benthic.train.step import accumulate_gradients
from benthic.train.validate import bits_per_byte_of
from benthic.train.work import Place, Spent, Validation


class Sft:
    """The samples prepared in a run's directory."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def prepare(self, config: RunConfig) -> tuple[RunConfig, dict[str, str]]:
        """Samples are made if they are not there; epochs become steps."""
        tokenizer = Tokenizer.load(self._out / "tokenizer")
        if tokenizer.vocab_size > config.model.vocab_size:
            raise InputError(
                f"{self._out / 'tokenizer'}: {tokenizer.vocab_size} tokens, but the model has {config.model.vocab_size}"
            )
        prepare_sft(stage_settings(config), self._out)
        sft = settings_of(config)
        if sft.epochs is not None:
            sequences = packed_batches(stage_settings(config), self._out).sequences(sft.epochs)
            sft = sft.model_copy(update={"steps": -(-sequences // sft.batch_size), "epochs": None})
            config = config.model_copy(update={"posttrain": config.posttrain.model_copy(update={"sft": sft})})
        hashes = {"sft": sha256(self._out / FOLDER / FILE_NAME), "tokenizer": tokenizer.fingerprint}
        hashes |= borrowed(config, self._out, tokenizer, sft.mtp_rehearsal)
        return config, hashes

    def open(self, place: Place) -> "SftWork":
        """The stage, over the samples that are not held out."""
        return SftWork(place)


class SftWork:
    """Answers of packed conversations."""

    measure = "bits per byte of held-out answers"
    validates_first = True

    def __init__(self, place: Place) -> None:
        self._config, self._compute = place.config, place.compute
        train = place.config.train
        self._batch_size = train.micro_batch_size or train.batch_size
        self._batches = packed_batches(place.config, place.out)
        self._held_out = AnswerStore(TokenStore(place.out / FOLDER, "val"))
        tokenizer = Tokenizer.load(place.out / "tokenizer")
        self._padding = tokenizer.eos_id
        # Conversations are learnt from anyway.
        self._rehearsal = open_rehearsal(
            place.config, place.out, tokenizer, settings_of(place.config).mtp_rehearsal, conversations=False
        )
        self._step = 0
        self._figures: dict[str, Any] = {}
        self._costs = SequenceCosts(place.config, place.architecture, place.course)

    def describe(self) -> str:
        """Length of sequences, and sources."""
        sources = ", ".join(one.source for one in sft_sources(self._config))
        return f"{self._config.train.sequence_length} tokens a sequence over answers of {sources}"

    def batch(self, state: TrainState, settings: StepSettings, first: int) -> Batch:
        """The sequences from ``first`` on."""
        self._figures, self._step = {}, state.step
        return self._batches.at(first, settings.batch_size)

    def gradients(
        self, objective: Objective, batch: Batch, settings: StepSettings, *, micro_batch_size: int, compute: Compute
    ) -> Losses:
        """Of the answers' tokens, each predicted from the one before it and from those further back."""
        losses = accumulate_gradients(objective, batch, settings, micro_batch_size=micro_batch_size, compute=compute)
        if self._rehearsal is not None:
            assert isinstance(objective.model, LanguageModel)
            found = self._rehearsal.rehearse(objective.model, self._step, compute)
            self._figures["rehearsal"] = found
        return losses

    def figures(self) -> dict[str, Any]:
        """What came of rehearsal."""
        return self._figures

    def spent(self, step: int) -> Spent:
        """Tokens of conversations read, prompts and padding among them; operations, those of rehearsal too."""
        found = self._costs.spent(step)
        return found._replace(flops=found.flops + step * self._rehearsal.flops) if self._rehearsal else found

    def validate(self, state: TrainState, *, last: bool) -> Validation:
        """Bits per byte of held-out answers, and how often each of their tokens is predicted right."""
        compute: Compute = "fp32" if last else self._compute
        found = bits_per_byte_of(
            state.model,
            self._read(None if last else self._config.train.validation_tokens, 1),
            self._held_out.answer_tokens(),
            self._held_out.store.manifest.val.bytes,
            compute,
        )
        probed = probe_batches(state.model, self._read(PROBED_TOKENS, 1 + len(state.model.mtp)), compute)
        return Validation(found, {"answer_bits_per_byte": found, **probed._asdict()})

    def _read(self, max_tokens: int | None, lookahead: int) -> Any:
        length = self._config.train.sequence_length
        return in_order(self._held_out, length, lookahead, self._batch_size, self._padding, max_tokens)

    def carry(self) -> Carried:
        """Nothing: a batch is found by its number."""
        return NOTHING

    def restore(self, carried: Carried, source: str) -> None:
        """Raises InputError if there is something."""
        if carried != NOTHING:
            raise InputError(f"{source}: holds what a stage of another kind carries")


def settings_of(config: RunConfig) -> SftConfig:
    """The settings of fine-tuning, which must be there."""
    assert config.posttrain.sft is not None
    return config.posttrain.sft


def stage_settings(config: RunConfig) -> RunConfig:
    """The settings of a run's stage of fine-tuning."""
    return next(stage.config for stage in stages(config) if stage.kind == "sft")


def packed_batches(config: RunConfig, out: Path) -> PackedBatches:
    """The training sequences of a stage with these settings."""
    store = TokenStore(out / FOLDER, "train")
    train = config.train
    return PackedBatches(
        AnswerStore(store),
        store.manifest.settings[SAMPLES]["train"],
        [one.weight for one in sft_sources(config)],
        train.sequence_length,
        1 + config.model.num_nextn_predict_layers,
        Tokenizer.load(out / "tokenizer").eos_id,
        train.seed,
    )
