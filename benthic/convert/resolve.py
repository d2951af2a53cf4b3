"""What a path given by the user is: a run, an exported model or a Hugging Face directory; and its weights."""

from pathlib import Path

import torch

from benthic.config.load import load_run_config
from benthic.config.schema import ModelConfig
from benthic.convert.huggingface import load_hf
from benthic.errors import InputError
from benthic.model import LanguageModel, build_model
from benthic.model.language_model import cast_parameters
from benthic.train import checkpoint

WHAT_IS_ALLOWED = "give a run directory, or an exported or Hugging Face model directory"


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[LanguageModel, ModelConfig]:
    """The model of a run (its ``model/``, else its newest checkpoint), or of an exported or Hugging Face directory.

    Args:
        path: the directory.
        dtype: of the parameters, by default the one they are stored in.
        device: where the model goes, by default the CPU.

    Raises:
        InputError: nothing of this kind is there, or it is damaged.
    """
    path = _directory(path)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return load_hf(folder, dtype, device)
    newest = _newest_checkpoint(path)
    if newest is None:
        raise InputError(f"{path}: holds no config.json, model/ or checkpoints/; {WHAT_IS_ALLOWED}")
    return _load_checkpoint(path, newest, dtype, device)


def find_tokenizer(path: str | Path) -> Path:
    """The folder with the tokenizer of what :func:`load_model` loads. Raises InputError if there is none."""
    path = _directory(path)
    for folder in (path / "tokenizer", path, path / "model"):
        if (folder / "tokenizer.json").is_file():
            return folder
    raise InputError(f"{path}: holds no tokenizer.json; {WHAT_IS_ALLOWED}")


def _directory(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: {'not a directory' if path.exists() else 'no such directory'}; {WHAT_IS_ALLOWED}")
    return path


def _newest_checkpoint(run: Path) -> Path | None:
    """Of all stages; one stage follows another, so the newest is of the last."""
    newest = [latest for stage in (run / "checkpoints").glob("*") if (latest := checkpoint.latest(stage)) is not None]
    return max(newest, key=lambda path: path.stat().st_mtime, default=None)


def _load_checkpoint(
    run: Path, path: Path, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[LanguageModel, ModelConfig]:
    config = load_run_config(run / "config.toml").model
    model = build_model(config, device="meta").to_empty(device=device or "cpu")
    weights = checkpoint.load(path).tensors.get("model", {})
    checkpoint.copy_into(model.state_dict(), weights, str(path / "model.safetensors"))
    if dtype is not None:
        cast_parameters(model, dtype)
    return model, config
