"""Runs from Hugging Face directories and back: what ``benthic import`` and ``benthic export --format hf`` do."""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from benthic.convert.config import dtype_name
from benthic.convert.folder import new_folder
from benthic.convert.huggingface import check_copies, copy_tokenizer, open_hf, save_hf, write_hf
from benthic.convert.resolve import find_tokenizer, load_model
from benthic.errors import InputError
from benthic.report.card import model_card
from benthic.report.facts import read_facts


class Imported(NamedTuple):
    """What an import did."""

    tensors: int
    dequantised: int
    """Weights that were FP8 blocks and are now in ``dtype``."""
    shards: int
    dtype: str
    mtp_layers: int
    tokenizer: bool
    """Whether the directory had a tokenizer.json."""


def import_run(hf_dir: Path, out: Path) -> Imported:
    """Makes a run directory (``model/`` and ``tokenizer/``) of a Hugging Face directory, a shard at a time.

    Raises:
        InputError: ``hf_dir`` is not a model that Benthic can run, or ``out`` is there and not empty.
        WorkFailed: the disk is full.
    """
    _refuse_no_model(hf_dir)
    published = open_hf(hf_dir)
    check_copies(published)
    with new_folder(out) as draft:
        (draft / "model").mkdir()
        shards = write_hf(
            draft / "model",
            published.config,
            published.read,
            token_ids=published.token_ids,
            dtype=published.dtype,
            purpose="import",
        )
        tokenizer = (hf_dir / "tokenizer.json").is_file()
        if tokenizer:
            (draft / "tokenizer").mkdir()
            copy_tokenizer(hf_dir, draft / "tokenizer")
            # Beside the tokenizer too, which takes the ids that end a turn from it.
            shutil.copyfile(draft / "model" / "generation_config.json", draft / "tokenizer" / "generation_config.json")
    return Imported(
        tensors=len(published.sources),
        dequantised=len(published.checkpoint.scales),
        shards=shards,
        dtype=dtype_name(published.dtype),
        mtp_layers=published.config.num_nextn_predict_layers,
        tokenizer=tokenizer,
    )


def _refuse_no_model(folder: Path) -> None:
    if (folder / "config.json").exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: {'not a directory' if folder.exists() else 'no such directory'}")
    if any((folder / name).exists() for name in ("config.toml", "checkpoints", "model")):
        raise InputError(
            f"{folder}: is a run already, and can be used as it is; to copy its model, export it and import the export"
        )
    raise InputError(f"{folder}: holds no config.json; give a Hugging Face model directory")


def export_hf(run: Path, out: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the model and tokenizer of a run as a Hugging Face directory, with a model card.

    Raises:
        InputError: there is no model or tokenizer, or ``out`` holds something else than an earlier export, or is
            a run's own model, which may be an import that exists nowhere else.
    """
    _refuse_a_runs_model(out)
    tokenizer = find_tokenizer(run)
    model, config = load_model(run, dtype)
    save_hf(model, config, tokenizer, out, card=model_card(read_facts(run, config)))


def _refuse_a_runs_model(out: Path) -> None:
    for folder in (out.resolve(), *out.resolve().parents):
        of_run = any((folder.parent / name).exists() for name in ("config.toml", "checkpoints", "tokenizer"))
        if folder.name == "model" and of_run:
            raise InputError(f"{out}: is the model of the run {folder.parent}; choose another directory")
