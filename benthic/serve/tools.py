"""Functions that a model may call: how it is told of them, and how its calls are found in what it writes.

A chat template that knows ``tools`` renders them itself; for any other they are put into words, in the widespread form
of Hermes. What a model writes is parsed by the marks that its own template uses.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benthic.inference.stopping import StopScanner
from benthic.serve.requests import ChatMessage, FunctionCall, Tool


@dataclass(frozen=True)
class Style:
    """How a family of models writes calls: after ``begin``, each as ``call`` matches it, with name and arguments."""

    begin: str
    call: re.Pattern[str]


HERMES = Style("<tool_call>", re.compile(r"<tool_call>\s*(?P<json>\{.*?\})\s*(?:</tool_call>|$)", re.DOTALL))
_DEEPSEEK = Style(
    "<｜tool▁calls▁begin｜>",  # noqa: RUF001 - DeepSeek's own characters
    re.compile(
        r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>(?P<name>[^\n<]+)\n```json\n(?P<arguments>.*?)\n```"  # noqa: RUF001
        r"|(?P<name2>[^\n<]+)<｜tool▁sep｜>(?P<arguments2>.*?))\s*<｜tool▁call▁end｜>",  # noqa: RUF001
        re.DOTALL,
    ),
)
_KIMI = Style(
    "<|tool_calls_section_begin|>",
    re.compile(
        r"<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[^\s:<]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*"
        r"(?P<arguments>.*?)\s*<\|tool_call_end\|>",
        re.DOTALL,
    ),
)


def style_of(template: str | None) -> Style:
    """The style whose mark a chat template writes; Hermes' where it writes none that is known."""
    return next((style for style in (_DEEPSEEK, _KIMI) if template and style.begin in template), HERMES)


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


def parse_calls(text: str, style: Style, names: set[str]) -> list[FunctionCall]:
    """The calls in a text. None at all if any of them is not well-formed, or of a function that is not there."""
    calls = [_call(match.groupdict()) for match in style.call.finditer(text)]
    found = [call for call in calls if call is not None and call.name in names]
    return found if len(found) == len(calls) else []


def _call(found: Mapping[str, str | None]) -> FunctionCall | None:
    name, arguments = found.get("name") or found.get("name2"), found.get("arguments") or found.get("arguments2")
    try:
        if (whole := found.get("json")) is not None:
            return call_of_json(whole)
        if name is None or not isinstance(json.loads(arguments or ""), dict):
            return None
    except (ValueError, RecursionError):
        return None
    return FunctionCall.model_construct(name=name.strip(), arguments=arguments or "")


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
        homes[name] = _rehomed(tool.function.parameters or {"type": "object"}, f"#/$defs/{name}")
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


def for_template(messages: Sequence[ChatMessage], arguments_as_text: bool) -> list[dict[str, Any]]:
    """Messages as templates that know tools read them.

    Most want a call's arguments as an object, as transformers gives them; DeepSeek's joins them as text.
    """
    return [_message(message, arguments_as_text) for message in messages]


def _message(message: ChatMessage, arguments_as_text: bool) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    rendered: dict[str, Any] = {"role": role, "content": message.text}
    rendered |= {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key)) is not None}
    if message.tool_calls:
        rendered["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {
                "name": call.function.name,
                "arguments": call.function.arguments if arguments_as_text else _arguments(call.function)}}
            for call in message.tool_calls
        ]  # fmt: skip
    return rendered


def in_words(messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Messages for a template that knows only the roles system, user and assistant, with tools told in the first."""
    rendered = [{"role": _role_in_words(message), "content": _content_in_words(message)} for message in messages]
    if not tools:
        return rendered
    told = _INSTRUCTION.format("\n".join(json.dumps(schema(tool), ensure_ascii=False) for tool in tools))
    if rendered[0]["role"] == "system":
        return [{"role": "system", "content": f"{rendered[0]['content']}\n\n{told}"}, *rendered[1:]]
    return [{"role": "system", "content": told}, *rendered]


_INSTRUCTION = (
    "You may call functions. Their signatures are between <tools> and </tools>:\n<tools>\n{}\n</tools>\n"
    'To call one, write <tool_call>\n{{"name": NAME, "arguments": OBJECT}}\n</tool_call>'
)


def schema(tool: Tool) -> dict[str, Any]:
    """A tool as a template gets it."""
    return tool.model_dump(exclude_none=True)


def _role_in_words(message: ChatMessage) -> str:
    return {"developer": "system", "tool": "user"}.get(message.role, message.role)


def _content_in_words(message: ChatMessage) -> str:
    if message.role == "tool":
        return f"<tool_response>\n{message.text}\n</tool_response>"
    calls = [
        json.dumps({"name": call.function.name, "arguments": _arguments(call.function)}, ensure_ascii=False)
        for call in message.tool_calls or ()
    ]
    return "\n".join([*([message.text] if message.text else []), *(f"<tool_call>\n{c}\n</tool_call>" for c in calls)])


def _arguments(function: FunctionCall) -> Any:
    """As an object, or as the text they are if a model once wrote something else."""
    try:
        return json.loads(function.arguments)
    except (ValueError, RecursionError):
        return function.arguments
