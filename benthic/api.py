"""The public functions that join packages which know nothing of each other: models on disk, training, inference."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from benthic.config.complain import complaint
from benthic.config.load import inference_defaults
from benthic.config.posttrain import PROBLEMS, DistilConfig
from benthic.config.schema import InferenceConfig, RunConfig
from benthic.config.stages import BASE, PRETRAIN
from benthic.convert.huggingface import copy_tokenizer, is_written_for, save_hf, tokenizer_ids
from benthic.convert.resolve import (
    current_stage,
    find_tokenizer,
    is_exported,
    load_checkpoint,
    load_model,
    model_config,
)
from benthic.convert.shards import write_json
from benthic.data.manifest import Manifest
from benthic.data.prepare import Progress, refuse_model_directory
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.files import write_atomically
from benthic.inference import engine
from benthic.lock import locked
from benthic.model import LanguageModel, Trainable, Transformer
from benthic.parallel.open import open_world
from benthic.parallel.world import ALONE, World
from benthic.plan.memory import refuse_too_large, refuse_too_large_together
from benthic.posttrain import distil as distillation
from benthic.posttrain.preferences import Preferences
from benthic.posttrain.problem_files import FOLDER as PROBLEMS_FOLDER
from benthic.posttrain.problem_files import write_problems
from benthic.posttrain.reward_model import RewardArchitecture, trunk_weights
from benthic.posttrain.rl import Rl
from benthic.posttrain.sft import Sft, stage_settings
from benthic.posttrain.sft_data import prepare_sft, split_of
from benthic.posttrain.teacher import Endpoint, OwnModel, is_address
from benthic.precision.latents import CachePrecision
from benthic.precision.quantise import Precision
from benthic.report import page
from benthic.report.card import FILE_NAME as CARD
from benthic.report.card import model_card
from benthic.report.facts import Facts, read_facts
from benthic.train import loop
from benthic.train.checkpoint import Checkpoint, latest, save
from benthic.train.progress import Opener, open_progress
from benthic.train.work import Kinds


def load(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Transformer:
    """The transformer of a run, an exported or a Hugging Face directory: token ids (B, T) in, logits (B, T, V) out.

    Args:
        path: the directory.
        dtype: of the parameters; by default the one they are stored in.
        device: where they go; by default the CPU.

    Raises:
        InputError: there is no such model, or it is damaged.
    """
    model, _ = load_model(path, dtype, device)
    return model.transformer.eval()


KINDS: Kinds = {**loop.PRETRAINING, "sft": Sft, "rl": Rl}
"""Of stages of training."""


def train(config: RunConfig, out: str | Path) -> loop.Trained:
    """Runs every stage of training on the data prepared in ``out``, or goes on, and leaves the model in ``out/model``.

    ``benthic.train`` is this function. What is written besides, and what it raises, is as in
    :func:`benthic.train.loop.train`; ``out/model`` is in Hugging Face layout. Under torchrun every process calls it,
    and the main one writes.

    Raises:
        InputError: besides, ``out/model`` is there and not of this training, or another process works in ``out``.
    """
    out = Path(out)
    with _training(config, out, KINDS) as world:
        trained = loop.train(config, out, kinds=KINDS, world=world)
        world.first(lambda: _export(trained.model, out))
    return trained


@contextmanager
def _training(config: RunConfig, out: Path, kinds: Kinds, *, alone: bool = False) -> Iterator[World]:
    """All processes of a run that trains in ``out``, or this one alone, once everything is ready for it."""
    if alone:
        refuse_too_large(config.model)
    else:
        refuse_too_large_together(config)
    with nullcontext(ALONE) if alone else open_world(config) as world, ExitStack() as held:
        world.first(lambda: _prepare(config, out, kinds, held))
        yield world


def _prepare(config: RunConfig, out: Path, kinds: Kinds, held: ExitStack) -> None:
    """Make ready for training in ``out``, and hold it."""
    refuse_model_directory(out)
    prepare_posttraining(config, out, kinds=kinds)
    held.enter_context(locked(out))
    _refuse_other_model(out)


def _export(model: Trainable, out: Path) -> None:
    assert isinstance(model, LanguageModel)
    save_hf(model, model.config, out / "tokenizer", out / "model", purpose="training")


def train_stages(
    config: RunConfig, out: Path, *, kinds: Kinds = KINDS, show: Opener = open_progress, alone: bool = False
) -> loop.Trained:
    """As :func:`train`, without writing ``out/model``; of stages of these kinds, on all processes or ``alone``."""
    with _training(config, out, kinds, alone=alone) as world:
        return loop.train(config, out, kinds=kinds, world=world, show=show)


def export_trained(out: Path) -> None:
    """Write ``out/model``, in Hugging Face layout with a model card, of the last weights of a run's training; where it
    is of those already, the card alone, for there may be more to tell.

    Raises:
        InputError: ``out/model`` is there and not of this training, or a checkpoint is damaged.
    """
    with locked(out):
        _refuse_other_model(out)
        stage, newest = current_stage(out)
        if newest is None:
            raise InputError(f"{out}: nothing has been trained that could be exported")
        card = model_card(read_facts(out, stage.config.model))
        if is_exported(out):
            write_atomically(out / "model" / CARD, card)
            return
        model, sizes = load_checkpoint(stage.config.model, newest)
        save_hf(model, sizes, out / "tokenizer", out / "model", purpose="training", card=card)


def train_reward_model(config: RunConfig, out: str | Path) -> loop.Trained:
    """Trains a reward model on the trunk of ``config.posttrain.base``, by ``config.posttrain.reward``, or goes on.

    Raises:
        InputError: there is no such model, ``out`` holds something else, or the pairs are of no use; besides, as
            :func:`benthic.train.loop.train`.
    """
    out = Path(out)
    refuse_too_large(config.model)
    with locked(out):
        if latest(out / "checkpoints" / BASE) is None:
            _bring(config, out, lambda weights: trunk_weights(weights, config.model.hidden_size))
        return loop.train(config, out, RewardArchitecture(), {"reward": Preferences})


def prepare_posttraining(
    config: RunConfig, out: str | Path, progress: Progress = lambda *_: None, *, kinds: Kinds = KINDS
) -> list[str]:
    """Everything that the stages after pretraining need besides its weights, or nothing where it is there.

    A model that the run begins with, ``config.posttrain.base``, is copied into ``out``, which then needs nothing of it;
    problems to learn from are written down, and conversations become samples. Returns what somebody should know who did
    not ask.

    Raises:
        InputError: there is no such model, ``out`` holds something else, or the conversations are of no use.
    """
    out = Path(out)
    with locked(out):
        if config.posttrain.base is not None and latest(out / "checkpoints" / BASE) is None:
            _bring(config, out)
        rl, sft = config.posttrain.rl, config.posttrain.sft
        if rl is not None:
            told = sft is not None and PROBLEMS in (one.source for one in sft.sources)
            write_problems(rl, out / PROBLEMS_FOLDER, sft.problems if sft is not None and told else 0)
        if sft is None or "sft" not in kinds:
            return []
        return prepare_sft(stage_settings(config), out, progress).remarks()


def _bring(
    config: RunConfig, out: Path, what: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda weights: weights
) -> None:
    """Copy ``what`` a run begins with, of the weights that are there, and the tokenizer."""
    assert config.posttrain.base is not None
    base = Path(config.posttrain.base)
    for name in ("config.toml", "checkpoints", "model", "data"):
        if (out / name).exists():
            raise InputError(f"{out / name}: already there; give a directory of its own for what begins with {base}")
    tokenizer = find_tokenizer(base)
    Tokenizer.load(tokenizer)
    model, found = load_model(base, torch.float32)
    if found != config.model:
        raise InputError(f"{base}: its model is not the one that the settings describe")
    manifest = Manifest.load(base / "data") if (base / "data").is_dir() else None
    split = {"split": split_of(manifest)} if manifest else {}
    # The tokenizer first: the checkpoint says that all is there.
    shutil.rmtree(out / "tokenizer", ignore_errors=True)
    (out / "tokenizer").mkdir()
    copy_tokenizer(tokenizer, out / "tokenizer")
    write_json(out / "tokenizer" / "generation_config.json", tokenizer_ids(tokenizer))  # what ends a turn
    state = {"step": 0, "base": str(base), **split}
    save(out / "checkpoints" / BASE, 0, Checkpoint({"model": what(model.state_dict())}, state), keep=None)


def _refuse_other_model(out: Path) -> None:
    """Before the training, whose result takes the place of ``out/model``: was that written by this run?"""
    model = out / "model"
    if not model.is_symlink() and not (model.exists() and (model.is_file() or any(model.iterdir()))):
        return
    if not (is_written_for("training", model) and any(latest(out / "checkpoints" / name) for name in (PRETRAIN, BASE))):
        raise InputError(f"{model}: already there, and not of a training in {out}; give another --out")


def distil(config: DistilConfig, out: Path, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Asks a teacher, judges its answers and writes those that are kept: see :func:`benthic.posttrain.distil.distil`.

    Raises:
        InputError: besides, there is no such model or endpoint.
    """
    teacher = Endpoint(config) if is_address(config.teacher) else _own_teacher(config)
    try:
        return distillation.distil(config, teacher, out, progress)
    finally:
        teacher.close()


def _own_teacher(config: DistilConfig) -> OwnModel:
    tokenizer = Tokenizer.load(find_tokenizer(config.teacher))
    model, _ = load_model(config.teacher)
    return OwnModel(str(Path(config.teacher).absolute()), model, tokenizer, config)


def write_report(run: str | Path) -> tuple[Path, Facts]:
    """Writes ``report.html`` of a run, finished or not, trained here or imported; returns its path and what it tells.

    Raises:
        InputError: this is no run, or the page cannot be written.
        WorkFailed: the disk is full.
    """
    run = Path(run)
    imported = not (run / "config.toml").is_file() and (run / "model" / "config.json").is_file()
    return page.write_report(run, model_config(run) if imported else None)


class Engine(engine.Engine):
    """The inference engine over a run, an exported or a Hugging Face directory.

    Args:
        path: the directory.
        dtype: of the parameters; by default the one they are stored in.
        device: where they go; by default the CPU.
        cache_gib: memory of the latent cache, in GiB.
        max_batch: prompts decoded at once.
        max_draft: tokens the MTP modules may draft ahead; 0 switches them off.
        precision: that weights are kept in for decoding: fp32, bf16, fp8, int8 or int4; by default their own.
        cache_precision: that latents are cached in: fp32, bf16 or fp8; by default the type of the weights.
        **settings: defaults for every request, keys of ``InferenceConfig``; over the ``[inference]`` of a run.

    Raises:
        InputError: there is no such model or tokenizer, it is damaged, or a setting is wrong.
    """

    def __init__(
        self, path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
        cache_gib: float = 1.0, max_batch: int = 16, max_draft: int = 3, precision: Precision | None = None,
        cache_precision: CachePrecision | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        tokenizer = Tokenizer.load(find_tokenizer(path))
        defaults = _defaults(Path(path), settings)
        model, _ = load_model(path, dtype, device)
        super().__init__(
            model, tokenizer, defaults, cache_gib=cache_gib, max_batch=max_batch, max_draft=max_draft,
            precision=precision, cache_precision=cache_precision,
        )  # fmt: skip


def _defaults(path: Path, settings: dict[str, Any]) -> InferenceConfig:
    of_run = inference_defaults(path)
    try:
        return InferenceConfig.model_validate(of_run.model_dump() | settings)
    except ValidationError as error:
        raise InputError(complaint(error, InferenceConfig, "Engine")) from None
