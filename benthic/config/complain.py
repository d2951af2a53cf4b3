"""Turns what pydantic finds wrong into one line for the person who wrote the recipe.

The line names the file (or ``--set``), the key, the value found and what is allowed, and for an unknown key the
one that was probably meant.
"""

import difflib
import json
from collections.abc import Collection, Sequence
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from benthic.config.base import Settings

LONGEST_VALUE = 60


def complaint(error: ValidationError, settings: type[Settings], origin: str, overrides: Collection[str] = ()) -> str:
    """One line for the worst mistake in ``error`` and the number of further ones.

    Args:
        error: what validating ``settings`` raised.
        settings: the class the values were meant for.
        origin: the file the values came from.
        overrides: keys that came from the command line instead.
    """
    # A misspelt key often leaves another one missing: the spelling is the cause.
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
    key = ".".join(map(str, details[0]["loc"]))
    # What is wrong between two sections has no key of its own.
    culprit = key or next((override for override in overrides if override in details[0]["msg"]), "")
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{source_of(culprit, origin, overrides)} {_describe(details[0], key, settings)}{more}"


def source_of(key: str, origin: str, overrides: Collection[str]) -> str:
    """Where the value of ``key``, or of a part of it, was given: ``--set`` or the file ``origin``."""
    given = any(f"{key}.".startswith(f"{other}.") or other.startswith(f"{key}.") for other in overrides)
    return "--set" if given else f"{origin}:"


def nearest(name: str, known: Sequence[str]) -> str:
    """``did you mean 'x'?`` where some known name is close, else all that are allowed."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"allowed are {', '.join(known)}"


def shown(value: Any) -> str:
    """A value as TOML and JSON write it, on one line and not too long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


def _describe(detail: ErrorDetails, key: str, settings: type[Settings]) -> str:
    if detail["type"] == "extra_forbidden":
        *parents, last = map(str, detail["loc"])
        return f"{key} = {shown(detail['input'])}: no such setting; {nearest(last, _known_keys(settings, parents))}"
    if detail["type"] == "missing":
        return f"{key}: missing, and it has no default"
    if detail["type"] == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    return f"{key} = {shown(detail['input'])}: {_allowed(detail)}"


def _allowed(detail: ErrorDetails) -> str:
    if detail["type"] == "model_type":
        return "must be a table of settings"
    if detail["type"] == "tuple_type":
        return "must be an array"
    return "must " + detail["msg"].split(" should ", 1)[-1].replace(" after validation", "")


def _known_keys(settings: type[Settings], parents: Sequence[str]) -> list[str]:
    """Keys of the section at ``parents``; a model may also be given by its preset."""
    section = settings
    for name in parents:
        if name.isdecimal():  # an entry of an array of tables
            continue
        annotation = section.model_fields[name].annotation
        kinds = (annotation, *get_args(annotation))
        section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings))
    return [*section.model_fields, *(["preset"] if list(parents) == ["model"] else [])]
