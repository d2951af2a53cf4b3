"""What makes two runs the same run, so that a resumed one never goes on with other settings, data or tokenizer."""

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from benthic.config.schema import RunConfig
from benthic.errors import InputError

MAY_CHANGE = {"train.checkpoint_every", "train.keep_checkpoints", "train.validate_every", "train.validation_tokens"}
_SECTIONS = {"model", "data", "train", "precision"}


def identity(requested: RunConfig, resolved: RunConfig, corpus: dict[str, str]) -> dict[str, Any]:
    """What a checkpoint keeps: settings as asked for and as resolved by measuring, hashes of data and tokenizer."""
    return {
        "requested": requested.model_dump(mode="json", include=_SECTIONS),
        "resolved": resolved.model_dump(mode="json", include=_SECTIONS),
        "corpus": corpus,
    }


def resume_settings(requested: RunConfig, saved: dict[str, Any], corpus: dict[str, str], source: str) -> RunConfig:
    """The settings to go on with: those asked for, with what was once measured taken from the checkpoint.

    Raises:
        InputError: the settings are neither those once asked for nor those once resolved, or the data or
            tokenizer is another. The message names ``source`` and each difference.
    """
    given = requested.model_dump(mode="json", include=_SECTIONS)
    changed = differences(given, saved["resolved"]) and differences(given, saved["requested"])
    changed = [*changed, *differences(corpus, saved["corpus"])]
    if changed:
        raise InputError(f"{source} was made with other settings: {'; '.join(changed)}; "
                         "restore these, or give another --out")
    measured = {key: saved["resolved"][key] for key in ("train", "precision")}
    measured["train"] = {**measured["train"], **_free_to_change(given["train"])}
    try:
        return RunConfig.model_validate({**requested.model_dump(mode="json"), **measured})
    except ValidationError as error:
        raise InputError(f"{source}: state.json holds unusable settings ({error.error_count()} errors)") from error


def differences(given: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Settings that differ and may not, as ``key: saved ..., given ...``."""
    flat_given, flat_saved = dict(_flatten(given)), dict(_flatten(saved))
    keys = sorted((flat_given.keys() | flat_saved.keys()) - MAY_CHANGE)
    return [
        f"{key}: saved {flat_saved.get(key)}, given {flat_given.get(key)}"
        for key in keys if flat_given.get(key) != flat_saved.get(key)
    ]


def _free_to_change(train: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in train.items() if f"train.{key}" in MAY_CHANGE}


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
