"""Recipes in, settings out: the one door through which a user's choices enter, and where their mistakes are caught.

A recipe is a TOML file, ``--set a.b=c`` goes over it, and ``[model] preset = "nano"`` stands for all of a model's
sizes. Whatever is wrong is refused before anything is written, with one line that says where, what and what is
allowed.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from benthic.config.base import Settings
from benthic.config.complain import complaint, nearest, shown, source_of
from benthic.config.posttrain import PosttrainConfig
from benthic.config.presets import PRESETS
from benthic.config.schema import InferenceConfig, ModelConfig, PrecisionConfig, RunConfig, ServeConfig
from benthic.errors import InputError

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "quickstart"

# A run's length is given once: setting one key on the command line takes the other out of the recipe.
ALTERNATIVES = {
    "train.steps": "train.minutes",
    "train.minutes": "train.steps",
    "posttrain.sft.steps": "posttrain.sft.epochs",
    "posttrain.sft.epochs": "posttrain.sft.steps",
}

Tree = dict[str, Any]


def load_run_config(recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe, lays ``overrides`` over it and checks the whole.

    Args:
        recipe: path of a TOML file or the name of one that comes with Benthic; by default ``quickstart``.
        overrides: settings such as ``train.steps=200``; the value is read as TOML, or else as plain text.

    Raises:
        InputError: the recipe cannot be found or read, is not TOML, or holds a wrong key or value.
    """
    path = _find_recipe(recipe or DEFAULT_RECIPE)
    return _resolve(_read_toml(path), str(path), overrides)


def load_posttrain_config(
    recipe: str | Path, overrides: Sequence[str], base: str, model: ModelConfig, stage: str
) -> RunConfig:
    """A recipe for one stage after pretraining, of a model that is there: sizes in the recipe give way to its own.

    Args:
        recipe: as for ``load_run_config``; it must have the section ``posttrain.STAGE``, and others are left out.
        overrides: as for ``load_run_config``, but not of ``model``.
        base: the directory the model is from.
        model: its sizes.
        stage: ``sft``, ``rl``, ``reward`` or ``distil``.

    Raises:
        InputError: as ``load_run_config``, or the section is not there.
    """
    path = _find_recipe(recipe)
    tree = _read_toml(path)
    for key in override_keys(overrides):
        if key.partition(".")[0] == "model":
            raise InputError(f"--set {key}: the model is that of {base}, as it is")
    tree["model"] = model.model_dump(exclude_none=True)
    if not {"steps", "minutes"} & tree.setdefault("train", {}).keys():
        tree["train"]["steps"] = 1  # of pretraining, which there is none of
    config = _resolve(tree, str(path), overrides)
    section = getattr(config.posttrain, stage)
    if section is None:
        raise InputError(f"{path}: has no [posttrain.{stage}]")
    try:
        posttrain = PosttrainConfig.model_validate({"base": base, stage: section})
    except ValidationError as error:
        raise InputError(complaint(error, PosttrainConfig, str(path))) from None
    # What says for itself what it computes in has nothing to be measured.
    precision = PrecisionConfig(compute=section.compute) if hasattr(section, "compute") else config.precision
    return config.model_copy(update={"posttrain": posttrain, "precision": precision})


def load_preset_or_recipe(name: str, overrides: Sequence[str] = (), *, prefer_recipe: bool = False) -> RunConfig:
    """A recipe, or the model of a preset with sequences of its pretraining length. Raises as ``load_run_config``.

    A name of both is the preset's, unless ``prefer_recipe``.
    """
    if name in PRESETS and not (prefer_recipe and name in recipe_names()):
        return _preset_config(name, overrides)
    if not Path(name).exists() and name not in recipe_names():
        raise InputError(_unknown("preset or recipe", name, list(dict.fromkeys([*PRESETS, *recipe_names()]))))
    return load_run_config(name, overrides)


def load_data_config(sources: Sequence[str], overrides: Sequence[str] = ()) -> RunConfig:
    """A recipe, or the default one over other sources of text. Raises as ``load_run_config``."""
    recipe = recipe_among(sources)
    if recipe is not None:
        return load_run_config(recipe, overrides)
    path = _find_recipe(DEFAULT_RECIPE)
    tree = _read_toml(path)
    return _resolve(tree | {"data": {**tree["data"], "sources": list(sources)}}, str(path), overrides)


def recipe_among(sources: Sequence[str]) -> str | None:
    """The recipe, if that is what was given in the place of sources of text."""
    is_recipe = len(sources) == 1 and (sources[0] in recipe_names() or sources[0].endswith(".toml"))
    return sources[0] if is_recipe else None


def _preset_config(name: str, overrides: Sequence[str]) -> RunConfig:
    def with_length(length: int) -> RunConfig:
        # A preset says nothing of a run's length; one step makes it a whole recipe.
        tree = {"model": {"preset": name}, "train": {"steps": 1, "sequence_length": length}}
        return _resolve(tree, f"preset {name}", overrides)

    model = with_length(1).model
    yarn, length = model.rope_scaling, model.max_position_embeddings
    return with_length(length if yarn is None else min(length, yarn.original_max_position_embeddings))


def section_settings(section: str, overrides: Sequence[str]) -> Tree:
    """What ``overrides`` say of one section, by key: all that may be set where there is no recipe to set it over."""
    found: Tree = {}
    for key, value in map(_parse_override, overrides):
        name, _, last = key.partition(".")
        if name != section or not last:
            raise InputError(f"--set {key} = {shown(value)}: no such setting here; allowed are {section}.KEY")
        found[last] = value
    return found


class _ServeFile(Settings):
    serve: ServeConfig


def load_serve_config(file: str | Path | None = None, overrides: Sequence[str] = ()) -> ServeConfig:
    """``[serve]`` of a TOML file, which may hold other sections of a recipe too, with ``serve.KEY=VALUE`` over it.

    Raises:
        InputError: the file cannot be read, is not TOML, or it or ``overrides`` hold a wrong key or value.
    """
    tree = {} if file is None else _read_toml(Path(file))
    for name in tree:
        if name not in RunConfig.model_fields:
            raise InputError(f"{file}: {name}: no such section; {nearest(name, list(RunConfig.model_fields))}")
    section_settings("serve", overrides)  # refuses keys of other sections
    tree = {"serve": tree.get("serve", {})}
    for key, value in map(_parse_override, overrides):
        _assign(tree, key, value)
    try:
        return _ServeFile.model_validate(_tuples(tree), strict=True).serve
    except ValidationError as error:
        raise InputError(complaint(error, _ServeFile, str(file), override_keys(overrides))) from None


def dump_toml(config: RunConfig) -> str:
    """Every setting with its value, as TOML that ``load_run_config`` reads back to an equal config.

    TOML has no null: a setting that is ``None`` is left out, and every such setting has ``None`` as its default.
    """
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def inference_defaults(directory: Path) -> InferenceConfig:
    """``[inference]`` of a run; of any other directory with a model, what the schema says.

    Raises:
        InputError: the run's ``config.toml`` is damaged.
    """
    recipe = directory / "config.toml"
    return load_run_config(recipe).inference if recipe.is_file() else InferenceConfig()


def recipe_names() -> list[str]:
    """Names of the recipes that come with Benthic."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def _find_recipe(recipe: str | Path) -> Path:
    if str(recipe) in recipe_names():
        return RECIPES / f"{recipe}.toml"
    if not Path(recipe).exists():
        raise InputError(_unknown("recipe", str(recipe), recipe_names()))
    return Path(recipe)


def _unknown(kind: str, name: str, known: list[str]) -> str:
    return f"{kind} {name!r}: no such file or name; {nearest(name, known)}"


def _read_toml(path: Path) -> Tree:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid TOML: {' '.join(str(error).split())}") from error


def _resolve(tree: Tree, origin: str, overrides: Sequence[str]) -> RunConfig:
    settings = [_parse_override(text) for text in overrides]
    keys = override_keys(overrides)
    for key, value in settings:
        if key in ALTERNATIVES and value != "none":
            _remove(tree, ALTERNATIVES[key])
        if key == "model.preset":
            _remove(tree, "model")
    for key, value in settings:
        _assign(tree, key, value)
    tree = _expand_preset(tree, source_of("model.preset", origin, keys))
    try:
        return RunConfig.model_validate(_tuples(tree), strict=True)
    except ValidationError as error:
        raise InputError(complaint(error, RunConfig, origin, keys)) from None


def override_keys(overrides: Sequence[str]) -> list[str]:
    """Keys that ``--set`` gives."""
    return [key for key, _ in map(_parse_override, overrides)]


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise InputError(f"--set {text}: must be KEY=VALUE, such as train.steps=200")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return key, value
    return key, parsed["value"] if len(parsed) == 1 else value


def _assign(tree: Tree, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for depth, name in enumerate(parents):
        child = tree.setdefault(name, {})
        if isinstance(child, list):
            _assign_within(child, [*parents[depth + 1 :], last], value, key)
            return
        if not isinstance(child, dict):
            raise InputError(f"--set {key}: {'.'.join(parents[: depth + 1])} is a single value and has no keys")
        tree = child
    tree[last] = value


def _assign_within(tables: list[Any], rest: list[str], value: Any, key: str) -> None:
    """Of an array of tables, such as ``train.extend``, the key ``rest`` of one: ``0.steps``."""
    number, *keys = rest
    if not (number.isdecimal() and int(number) < len(tables) and keys and isinstance(tables[int(number)], dict)):
        place = key.removesuffix(f".{'.'.join(rest)}")
        raise InputError(
            f"--set {key}: {place} has {len(tables)} entries; give {place}.NUMBER.KEY, from 0, or all of it"
        )
    _assign(tables[int(number)], ".".join(keys), value)


def _remove(tree: Tree, key: str) -> None:
    *parents, last = key.split(".")
    for name in parents:
        child = tree.get(name)
        if not isinstance(child, dict):
            return
        tree = child
    tree.pop(last, None)


def _expand_preset(tree: Tree, source: str) -> Tree:
    """Replaces ``model.preset`` by its sizes, under whatever else the recipe says of the model."""
    model = tree.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return tree
    name = model["preset"]
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"{source} model.preset = {shown(name)}: no such preset; {nearest(str(name), list(PRESETS))}")
    own = {key: value for key, value in model.items() if key != "preset"}
    return tree | {"model": _merge(PRESETS[name].model_dump(), own)}


def _merge(base: Tree, over: Tree) -> Tree:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _tuples(value: Any) -> Any:
    """TOML's arrays as tuples, which strict validation of frozen settings asks for."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
