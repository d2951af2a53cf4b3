"""Functions that a model may call: how it is told of them, and how its calls are found in what it writes.

A chat template that knows ``tools`` renders them itself; for any other they are put into words, in the widespread form
of Hermes. What a model writes is parsed by the marks that its own template uses.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benthic.inference.stopping import StopScanner
from benthic.serve.matcher import CALL, END_OF_CALL
from benthic.serve.requests import ChatMessage, FunctionCall, Tool


@dataclass(frozen=True)
class Style:
    """How a family of models writes calls: after ``begin``, each between ``call`` and ``end``.

    ``inside`` matches what stands there, spaces around it taken off, with name and arguments. Without it that is an
    object of JSON with both, which may hold the marks in its strings.
    """

    begin: str
    call: str
    end: str
    inside: re.Pattern[str] | None = None


HERMES = Style(CALL, CALL, END_OF_CALL)
_DEEPSEEK = Style(
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",  # noqa: RUF001 - DeepSeek's own characters
    re.compile(
        r"function<｜tool▁sep｜>(?P<name>[^\n<]+)\n```json\n(?P<arguments>.*)\n```"  # noqa: RUF001
        r"|(?P<name2>[^\n<]+)<｜tool▁sep｜>(?P<arguments2>.*)",  # noqa: RUF001
        re.DOTALL,
    ),
)  # fmt: skip
_KIMI = Style(
    "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_end|>",
    re.compile(
        r"(?:functions\.)?(?P<name>[^\s:<]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>(?P<arguments>.*)", re.DOTALL
    ),
)  # fmt: skip


def style_of(template: str | None) -> Style:
    """The style whose mark a chat template writes; Hermes' where it writes none that is known."""
    return next((style for style in (_DEEPSEEK, _KIMI) if template and style.begin in template), HERMES)


_NONE = {"type": "object", "properties": {}, "additionalProperties": False}
"""Parameters of a function that does not say any, as OpenAI's API has it."""


class ToolScanner:
    """Streamed text with the calls taken out: what comes before the first is released as it comes."""

    def __init__(self, style: Style, names: Sequence[str], *, one_only: bool = False) -> None:
        self._style, self._names, self._one_only = style, set(names), one_only
        self._before = StopScanner([style.begin])
        self._all = ""
        self._released = 0

    def push(self, piece: str) -> str:
        """Add a piece and return what can be released as content."""
        self._all += piece
        released = self._before.push(piece)
        self._released += len(released)
        return released

    def finish(self) -> tuple[str, list[FunctionCall]]:
        """The rest of the content, and the calls; marks that hold no call of a known function are content."""
        calls = parse_calls(self._all[self._released :], self._style, self._names)
        return ("" if calls else self._all[self._released :]), calls[:1] if self._one_only else calls

    @property
    def broken_off(self) -> bool:
        """Whether a further call was begun, and not ended."""
        return not self._one_only and self._all.rfind(self._style.call) > self._all.rfind(self._style.end)


def parse_calls(text: str, style: Style, names: set[str]) -> list[FunctionCall]:
    """The calls in a text. None at all if any of them is not well-formed, or of a function that is not there.

    The last may have been broken off before its end, and then is none. Whatever the text, it is read once: it may be
    long, and be all beginnings.
    """
    calls = []
    for inside in _insides(text, style):
        call = _call(inside.strip(), style)
        if call is None or call.name not in names:
            return []
        calls.append(call)
    return calls


def _insides(text: str, style: Style) -> Iterator[str]:
    """What stands between the marks of each call."""
    start = text.find(style.call)
    while start >= 0:
        start += len(style.call)
        after = _after_json(text, start) if style.inside is None else start
        end = text.find(style.end, after)
        if end < 0:
            if after > start and not text[after:].strip():  # a token that ends the turn stands for the mark
                yield text[start:]
            return
        yield text[start:end]
        start = text.find(style.call, end)


def _after_json(text: str, start: int) -> int:
    """Where the JSON that begins at ``start``, after spaces, ends; ``start`` if there is none."""
    begin = start
    while text[begin : begin + 1].isspace():
        begin += 1
    try:
        return json.JSONDecoder().raw_decode(text, begin)[1]
    except (ValueError, RecursionError):
        return start


def _call(inside: str, style: Style) -> FunctionCall | None:
    if style.inside is None:
        return call_of_json(inside)
    if (match := style.inside.fullmatch(inside)) is None:
        return None
    found = match.groupdict()
    name = found["name"] or found.get("name2", "")
    arguments = (found["arguments"] or found.get("arguments2") or "").strip()
    try:
        well = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return None
    return FunctionCall.model_construct(name=name.strip(), arguments=arguments) if well else None


def call_of_json(text: str) -> FunctionCall | None:
    """``{"name": ..., "arguments": {...}}`` as a call; None if it is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        return None
    arguments = content.get("arguments", content.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    return FunctionCall.model_construct(name=content["name"], arguments=json.dumps(arguments, ensure_ascii=False))


def schema_of_call(tools: Sequence[Tool]) -> dict[str, Any]:
    """A JSON schema of a call of one of these, as :func:`call_of_json` reads it."""
    calls, homes = [], {}
    for tool in tools:
        name = tool.function.name
        parameters = _NONE if tool.function.parameters is None else tool.function.parameters
        homes[name] = _rehomed(parameters, f"#/$defs/{name}")
        calls.append({
            "type": "object", "required": ["name", "arguments"], "additionalProperties": False,
            "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
        })  # fmt: skip
    return {"anyOf": calls, "$defs": homes}


def _rehomed(schema: Any, home: str) -> Any:
    """A schema as a part of another: its references to itself lead to where it is now."""
    if isinstance(schema, list):
        return [_rehomed(item, home) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _rehomed(value, home) for key, value in schema.items()}
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#"):
        moved["$ref"] = home + reference[1:]
    return moved


def as_message(message: ChatMessage) -> dict[str, Any]:
    """A message as :mod:`benthic.data.chat` reads it, which tells a model of tools that does not know them."""
    rendered: dict[str, Any] = {"role": message.role, "content": message.text}
    rendered |= {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key)) is not None}
    if message.tool_calls:
        rendered["tool_calls"] = [
            {"id": call.id, "type": "function",
             "function": {"name": call.function.name, "arguments": call.function.arguments}}
            for call in message.tool_calls
        ]  # fmt: skip
    return rendered


def schema(tool: Tool) -> dict[str, Any]:
    """A tool as a template gets it."""
    return tool.model_dump(exclude_none=True)
