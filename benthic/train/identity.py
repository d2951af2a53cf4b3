"""What makes two runs the same run, so that a resumed one never goes on with other settings, data or tokenizer."""

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from benthic.config.posttrain import PosttrainConfig
from benthic.config.schema import RunConfig
from benthic.errors import InputError

MAY_CHANGE = {
    "train.checkpoint_every",
    "train.device",
    "train.recompute",
    "train.keep_checkpoints",
    "train.validate_every",
    "train.validation_tokens",
    "train.on_spike",
    "train.spike_deviations",
    "train.expert_load_every",
    "train.price_per_hour",
    "train.track",
}
_SECTIONS = {"model", "data", "train", "precision", "posttrain"}
_OF_EVERY_STAGE = {"data", "tokenizer", "rehearsed data", "rehearsed sft"}
"""Of the hashes."""
_KEYS = ("requested", "resolved", "corpus")


def identity(
    requested: RunConfig, resolved: RunConfig, corpus: dict[str, str], architecture: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What a checkpoint keeps: settings as asked for and as resolved by measuring, hashes of data and tokenizer, and
    what tells the kind of model from the usual one.
    """
    return {
        "requested": requested.model_dump(mode="json", include=_SECTIONS),
        "resolved": resolved.model_dump(mode="json", include=_SECTIONS),
        "corpus": corpus,
        "architecture": architecture or {},
    }


def resume_settings(
    requested: RunConfig,
    saved: Any,
    corpus: dict[str, str],
    source: str,
    architecture: dict[str, Any] | None = None,
    *,
    kind: str = "corpus",
) -> RunConfig:
    """The settings to go on with: those asked for, with what was once measured taken from the checkpoint.

    Args:
        requested: settings as asked for now.
        saved: what :func:`identity` returned when the run began, as read back.
        corpus: hashes of data and tokenizer now.
        source: what the message names.
        architecture: what tells the kind of model from the usual one.
        kind: of the stage that was reached. What concerns later ones may be settled anew.

    Raises:
        InputError: the settings are neither those once asked for nor those once resolved, or the data, tokenizer
            or kind of model is another; the message names each difference.
    """
    if not isinstance(saved, dict) or not all(isinstance(saved.get(key), dict) for key in _KEYS):
        raise InputError(f"{source}/state.json: does not say which run it is of")
    given = _up_to(kind, requested.model_dump(mode="json", include=_SECTIONS))
    began = {key: _up_to(kind, _of_this_version(saved[key], source)) for key in ("resolved", "requested")}
    changed = differences(given, began["resolved"]) and differences(given, began["requested"])
    hashes = _OF_EVERY_STAGE | set(_sections_up_to(kind))
    now = {"corpus": corpus, "architecture": architecture or {}}
    before = {"architecture": {}, **{key: saved[key] for key in now if key in saved}}
    for side in (now, before):
        side["corpus"] = {name: value for name, value in side["corpus"].items() if name in hashes}
    changed = [*changed, *differences(now, before)]
    if changed:
        raise InputError(
            f"{source} was made with other settings: {'; '.join(changed)}; restore these, or give another --out"
        )
    return _with_measured(requested, began["resolved"])


def renewed(saved: dict[str, Any], settings: RunConfig, corpus: dict[str, str]) -> dict[str, Any]:
    """The identity of a run, once checked, with what is now given for stages that it has not reached."""
    posttrain = {"posttrain": settings.model_dump(mode="json", include={"posttrain"})["posttrain"]}
    both = {key: {**saved[key], **posttrain} for key in ("requested", "resolved")}
    return {**saved, **both, "corpus": {**saved["corpus"], **corpus}}


def _sections_up_to(kind: str) -> tuple[str, ...]:
    """Keys of ``posttrain`` that concern a stage of this kind or one before it."""
    names = tuple(PosttrainConfig.model_fields)
    return names[: names.index(kind) + 1] if kind in names else ()


def _up_to(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    concerned = _sections_up_to(kind)
    posttrain = {key: value for key, value in settings["posttrain"].items() if key in concerned}
    return {**settings, "posttrain": posttrain}


def _of_this_version(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """Saved settings with the defaults of those that an earlier version did not have."""
    try:
        return RunConfig.model_validate(settings).model_dump(mode="json", include=_SECTIONS)
    except ValidationError as error:
        raise InputError(f"{source}/state.json: settings that cannot be used") from error


def _with_measured(requested: RunConfig, resolved: dict[str, Any]) -> RunConfig:
    settings = requested.model_dump(mode="json")
    resolved = {key: value for key, value in resolved.items() if key != "posttrain"}
    free = {key: value for key, value in settings["train"].items() if f"train.{key}" in MAY_CHANGE}
    return RunConfig.model_validate({**settings, **resolved, "train": {**resolved["train"], **free}})


def differences(given: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Settings that differ and may not, as ``key: saved ..., given ...``."""
    flat_given, flat_saved = dict(_flatten(given)), dict(_flatten(saved))
    keys = sorted((flat_given.keys() | flat_saved.keys()) - MAY_CHANGE)
    return [
        f"{key}: saved {flat_saved.get(key)}, given {flat_given.get(key)}"
        for key in keys
        if flat_given.get(key) != flat_saved.get(key)
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
