"""What a path given by the user is: a run, an exported model or a Hugging Face directory; and its weights."""

from pathlib import Path

import torch

from benthic.config.load import load_run_config
from benthic.config.schema import ModelConfig
from benthic.config.stages import Stage, stages
from benthic.convert.huggingface import load_hf, open_hf
from benthic.errors import InputError
from benthic.model import LanguageModel, build_model
from benthic.model.language_model import cast_parameters
from benthic.model.memory import give_memory
from benthic.plan.memory import refuse_too_large
from benthic.train import checkpoint

WHAT_IS_ALLOWED = "give a run directory, or an exported or Hugging Face model directory"


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[LanguageModel, ModelConfig]:
    """The model of a run, or of an exported or Hugging Face directory.

    Of a run it is ``model/``, or the newest checkpoint if that was written later: training goes on, or was stopped.

    Args:
        path: the directory.
        dtype: of the parameters, by default the one they are stored in.
        device: where the model goes, by default the CPU.

    Raises:
        InputError: nothing of this kind is there, or it is damaged.
    """
    found = _find(path)
    if isinstance(found, Path):
        return load_hf(found, dtype, device)
    stage, newest = found
    return load_checkpoint(stage.config.model, newest, dtype, device)


def model_config(path: str | Path) -> ModelConfig:
    """The sizes of what :func:`load_model` loads. Raises InputError as that does."""
    found = _find(path)
    return open_hf(found).config if isinstance(found, Path) else found[0].config.model


def _find(path: str | Path) -> Path | tuple[Stage, Path]:
    """A folder in Hugging Face layout, or a stage's newest checkpoint."""
    path = _directory(path)
    stage, newest = current_stage(path) if any(path.glob("checkpoints/*/step-*")) else (None, None)
    for folder in (path, path / "model"):
        config = folder / "config.json"
        if config.is_file() and (newest is None or _written(config) >= _written(newest)):
            return folder
    if stage is None or newest is None:
        raise InputError(f"{path}: holds no config.json, model/ or checkpoints/; {WHAT_IS_ALLOWED}")
    return stage, newest


def is_exported(run: Path) -> bool:
    """Whether a run's ``model/`` is of its newest weights. Raises InputError if there is neither."""
    return _find(run) == run / "model"


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


def current_stage(run: Path) -> tuple[Stage, Path | None]:
    """The stage that a run has reached and its newest checkpoint; where there are none, the last stage."""
    whole = stages(load_run_config(run / "config.toml"))
    number, newest = checkpoint.reached(run / "checkpoints", [stage.name for stage in whole])
    return whole[number if newest else -1], newest


def _written(path: Path) -> int:
    """When a checkpoint or file was written; of a checkpoint, its manifest comes last."""
    manifest = path / "manifest.json"
    return (manifest if manifest.is_file() else path).stat().st_mtime_ns


def load_checkpoint(
    config: ModelConfig, path: Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[LanguageModel, ModelConfig]:
    """A model of these sizes with a checkpoint's weights, averaged where an average is kept.

    Raises:
        InputError: the checkpoint is damaged or does not fit, or the model is too large for this machine.
    """
    # The model, and what is read from the file before it is copied there.
    refuse_too_large(config, doing="loading", bytes_per_parameter=2 * torch.float32.itemsize)
    model = give_memory(build_model(config, device="meta"), device)
    tensors = checkpoint.load(path, groups=("model", "average")).tensors
    checkpoint.copy_into(model.state_dict(), tensors.get("model", {}), str(path / "model.safetensors"))
    if "average" in tensors:
        parameters = dict(model.named_parameters())
        checkpoint.copy_into(parameters, tensors["average"], str(path / "average.safetensors"))
    if dtype is not None:
        cast_parameters(model, dtype)
    return model, config
