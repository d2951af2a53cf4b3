"""Hugging Face directories in and out: ``DeepseekV3ForCausalLM`` as transformers, vLLM and SGLang run it.

Weights stream: reading fills the model tensor by tensor, writing holds one shard, importing never holds the model.
Either way the whole directory is checked against the table of names before the first weight is read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benthic.config.schema import ModelConfig
from benthic.convert.checkpoint import INDEX, Checkpoint, inside
from benthic.convert.config import config_from_hf, config_to_hf, is_fp8, stored_dtype
from benthic.convert.folder import new_folder
from benthic.convert.names import Place, empty_shared_experts, mtp_prefix, published_names
from benthic.convert.shards import PRODUCER, Purpose, write_json, write_shards
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.files import read_json_object
from benthic.model import LanguageModel, build_model
from benthic.model.memory import give_memory
from benthic.plan.memory import refuse_too_large
from benthic.report.card import FILE_NAME as CARD
from benthic.report.card import is_untouched

SHARD_BYTES = 5 * 10**9
EMBEDDING = "model.embed_tokens.weight"
HEAD = Place("transformer.head.weight")
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class PublishedModel:
    """A model on disk, checked whole but not read."""

    config: ModelConfig
    dtype: torch.dtype
    checkpoint: Checkpoint
    sources: Mapping[str, str]
    """For each published name the stored tensor that holds it: the name itself, or the one it is a copy of."""
    token_ids: Mapping[str, Any]
    """``bos_token_id`` and ``eos_token_id`` (one id, or all that end a turn), as far as they are given."""

    def read(self, name: str) -> Tensor:
        """The weight of a published name; FP8 blocks become fp32."""
        return self.checkpoint.read(self.sources[name])


def open_hf(folder: Path) -> PublishedModel:
    """Checks a Hugging Face directory against the table of names.

    A config that counts MTP layers whose weights are not there (transformers saves such) gives a model without them.

    Raises:
        InputError: another architecture, a missing, unexpected or misshapen tensor, a broken file.
    """
    source = inside(folder, "config.json")
    raw = read_json_object(source.resolve())
    config = config_from_hf(raw, source)
    checkpoint = Checkpoint(folder, fp8=is_fp8(raw, source))
    if not any(name.startswith(mtp_prefix(config, 0)) for name in checkpoint.names):
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    _check_count(config, checkpoint)
    sources = _sources(config, checkpoint, tied=raw.get("tie_word_embeddings") is True)
    return PublishedModel(config, stored_dtype(raw, source), checkpoint, sources, _published_ids(folder, raw))


def load_hf(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[LanguageModel, ModelConfig]:
    """Reads a Hugging Face directory into a model.

    Args:
        folder: with ``config.json`` and safetensors.
        dtype: of the parameters, by default the one that ``config.json`` states.
        device: where the model goes, by default the CPU.

    Raises:
        InputError: as :func:`open_hf`, or copies of the shared embedding or head differ, or it exceeds the memory.
    """
    published = open_hf(folder)
    refuse_too_large(published.config, doing="loading", bytes_per_parameter=(dtype or published.dtype).itemsize)
    model = build_model(published.config, device="meta", dtype=dtype or published.dtype)
    give_memory(model, device)
    _fill(model.state_dict(), published)
    return model, published.config


def save_hf(
    model: LanguageModel,
    config: ModelConfig,
    tokenizer_dir: Path | None,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    purpose: Purpose = "export",
    card: str | None = None,
) -> None:
    """Writes a model as a Hugging Face directory, complete or not at all.

    Args:
        model: the weights, with those of its MTP modules.
        config: of ``model``.
        tokenizer_dir: whose files are copied and whose begin and end ids the configs name.
        out: a free path, an empty folder, or what was written earlier for the same purpose, which is replaced.
        dtype: to store weights in, by default the model's; the routers' bias has at least fp32.
        max_shard_bytes: of a safetensors file, unless a single tensor is larger.
        purpose: what may later replace it.
        card: ``README.md``, as of :func:`benthic.report.card.model_card`; by default there is none.

    Raises:
        InputError: ``out`` holds something else or cannot be written.
        WorkFailed: the disk is full.
    """
    state, places = model.state_dict(), published_names(config)
    token_ids = {} if tokenizer_dir is None else tokenizer_ids(tokenizer_dir)
    with new_folder(out, replace=is_written_for(purpose, out)) as draft:
        write_hf(
            draft,
            config,
            lambda name: places[name].view(state),
            token_ids=token_ids,
            dtype=dtype or state[HEAD.parameter].dtype,
            max_shard_bytes=max_shard_bytes,
            purpose=purpose,
        )
        if tokenizer_dir is not None:
            copy_tokenizer(tokenizer_dir, draft)
        if card is not None:
            (draft / CARD).write_text(card, encoding="utf-8")


def check_copies(published: PublishedModel) -> None:
    """Raises InputError if copies of one weight, such as those of MTP layers, differ in the config's dtype."""
    for first, *others in _copies(published).values():
        weight = published.checkpoint.read(first).to(published.dtype)
        for other in others:
            if not torch.equal(weight, published.checkpoint.read(other).to(published.dtype)):
                raise _differ(published, other, first)


def write_hf(
    folder: Path,
    config: ModelConfig,
    read: Callable[[str], Tensor],
    *,
    token_ids: Mapping[str, Any],
    dtype: torch.dtype,
    max_shard_bytes: int = SHARD_BYTES,
    purpose: Purpose,
) -> int:
    """Fills a folder with configs and shards, taking each weight from ``read`` by its published name.

    Returns the number of shards. Raises WorkFailed if there is no room for them.
    """
    empty = empty_shared_experts(config)

    def stored(name: str) -> Tensor:
        weight = torch.empty(empty[name]) if name in empty else read(name)
        return weight.to(_stored_dtype(name, dtype))

    sizes = {name: weight.numel() * _stored_dtype(name, dtype).itemsize for name, weight in _blueprint(config).items()}
    shards = write_shards(folder, sizes | dict.fromkeys(empty, 0), stored, max_shard_bytes, purpose)
    write_json(folder / "config.json", config_to_hf(config, dtype, token_ids))
    write_json(folder / "generation_config.json", dict(token_ids))
    return shards


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files that are there."""
    for name in TOKENIZER_FILES:
        file = inside(source, name)
        if file.is_file():
            try:
                content = file.read_bytes()
            except OSError as error:
                raise InputError(f"{file}: cannot be read: {error.strerror}") from error
            (target / name).write_bytes(content)


def tokenizer_ids(tokenizer_dir: Path) -> dict[str, Any]:
    """Begin token and all tokens that end a turn, the end token first, so that other engines stop where ours does."""
    tokenizer = Tokenizer.load(tokenizer_dir)
    stops = [tokenizer.eos_id, *sorted(tokenizer.stop_ids - {tokenizer.eos_id})]
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops if len(stops) > 1 else stops[0]}


def _published_ids(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """From both configs; where they differ, the one for generation counts."""
    file = inside(folder, "generation_config.json")
    merged = {**raw, **(read_json_object(file.resolve()) if file.is_file() else {})}
    return {key: merged[key] for key in ("bos_token_id", "eos_token_id") if merged.get(key) is not None}


def is_written_for(purpose: Purpose, folder: Path) -> bool:
    """Did Benthic write all that is in this folder, for this purpose? Only then may the like replace it."""
    try:
        index = read_json_object(folder / INDEX)
        # An earlier version did not say what for.
        ours = index["metadata"]["producer"] == PRODUCER and index["metadata"].get("purpose", purpose) == purpose
        written = {INDEX, *CONFIG_FILES, *TOKENIZER_FILES, *index["weight_map"].values()}
        if (folder / CARD).is_file() and is_untouched((folder / CARD).read_text(encoding="utf-8")):
            written.add(CARD)  # what somebody has added to a card exists nowhere else
    except (InputError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        return False
    return ours and all(path.name in written for path in folder.iterdir())


def _blueprint(config: ModelConfig) -> dict[str, Tensor]:
    """Every published name with a tensor of its shape that has no data."""
    state = build_model(config, device="meta").state_dict()
    return {name: place.view(state) for name, place in published_names(config).items()}


def _check_count(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """A config may claim any number of layers and experts: before names are made of them, there must be tensors."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    least = layers + (layers - config.first_k_dense_replace) * config.n_routed_experts
    if least > len(checkpoint.names):
        raise InputError(
            f"{checkpoint.folder}: holds {len(checkpoint.names)} tensors, too few for {layers} layers and "
            f"n_routed_experts={config.n_routed_experts}"
        )


def _sources(config: ModelConfig, checkpoint: Checkpoint, *, tied: bool) -> dict[str, str]:
    places, names = published_names(config), checkpoint.names
    holder = {place: name for name, place in reversed(places.items()) if name in names}
    if tied:
        holder[HEAD] = EMBEDDING
    for name, place in places.items():
        if place not in holder:
            raise InputError(f"{checkpoint.folder}: tensor {name} is missing")
    known = places.keys() | empty_shared_experts(config).keys()
    for name in sorted(names - known):
        # Old exports hold the rotary frequencies, which the config determines.
        if not name.endswith(".rotary_emb.inv_freq"):
            raise InputError(
                f"{checkpoint.stored[name].file}: unexpected tensor {name}; config.json describes a model without it"
            )
    for name, weight in _blueprint(config).items():
        if name in names:
            checkpoint.check_shape(name, weight.shape)
    untied = {name for name in names if not (tied and places.get(name) == HEAD)}
    return {name: name if name in untied else holder[place] for name, place in places.items()}


def _fill(state: dict[str, Tensor], published: PublishedModel) -> None:
    """Copies every weight to its place, shard by shard; a second copy of a weight must equal the first."""
    places, stored = published_names(published.config), published.checkpoint.stored
    copies = {(places[name], source) for name, source in published.sources.items()}
    first: dict[Place, str] = {}
    for place, source in sorted(copies, key=lambda copy: (stored[copy[1]].file, copy[1])):
        target, weight = place.view(state), published.checkpoint.read(source)
        if first.setdefault(place, source) == source:
            target.copy_(weight)
        elif not torch.equal(target, weight.to(target)):
            raise _differ(published, source, first[place])


def _copies(published: PublishedModel) -> dict[Place, list[str]]:
    """Stored tensors of each weight that is stored more than once."""
    places = published_names(published.config)
    sources: dict[Place, list[str]] = {}
    for name, source in published.sources.items():
        if source not in (found := sources.setdefault(places[name], [])):
            found.append(source)
    return {place: found for place, found in sources.items() if len(found) > 1}


def _differ(published: PublishedModel, copy: str, first: str) -> InputError:
    file = published.checkpoint.stored[copy].file
    return InputError(f"{file}: {copy} differs from {first}: the model has one weight for both")


def _stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The routers' bias moves in steps of a thousandth, which half precision would round away."""
    bias = name.endswith("e_score_correction_bias")
    return torch.promote_types(dtype, torch.float32) if bias else dtype
