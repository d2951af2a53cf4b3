"""Chat templates, which may come with a model from anywhere, rendered in a sandbox and with bounded work."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from benthic.errors import InputError

Message = Mapping[str, Any]
MAX_SECONDS = 1.0
MAX_CHARACTERS = 16 << 20
MAX_FACTOR = 1000
"""Largest number in a product, so that text is not repeated until memory is full."""

_MAX_INDENT = 16
_deadline: ContextVar[float] = ContextVar("deadline")

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('role must be system, user or assistant, not ' ~ message['role']) -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] -}}
{%- endfor -%}
{{- '<|assistant|>' if add_generation_prompt else eos_token -}}
"""
"""Renders a conversation exactly as documents are encoded for pretraining, so that a base model already chats."""


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _too_large(operator, left, right):
            raise SecurityError("arithmetic too large for a chat template")
        return super().call_binop(context, operator, left, right)


def _too_large(operator: str, left: Any, right: Any) -> bool:
    """Could the result fill the memory? ``%`` on text, for one, pads to any width that the text asks for."""
    lengths = [len(side) for side in (left, right) if hasattr(side, "__len__")]
    factors = [abs(side) for side in (left, right) if isinstance(side, int)]
    if operator == "+":
        return sum(lengths) > MAX_CHARACTERS
    if operator == "%":
        return isinstance(left, str)
    return operator == "**" or max(factors, default=0) > MAX_FACTOR or math.prod(lengths + factors) > MAX_CHARACTERS


class ChatTemplate:
    """A compiled Jinja template with the names Hugging Face templates expect.

    Raises ``InputError`` for a template that cannot be compiled.
    """

    def __init__(self, source: str) -> None:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals.update(raise_exception=_raise, strftime_now=time.strftime)
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(_with_checks(environment, source))
        except (TemplateError, RecursionError) as error:
            raise InputError(f"chat template: {error}") from None

    def render(self, messages: Sequence[Message], **names: Any) -> str:
        """The prompt as text; raises ``InputError`` with the template's own complaint, or when it does too much."""
        _deadline.set(time.thread_time() + MAX_SECONDS)
        pieces, characters = list[str](), 0
        try:
            for piece in self._template.generate(messages=messages, **names):
                check_time()
                characters += len(piece)
                if characters > MAX_CHARACTERS:
                    raise SecurityError(f"more than {MAX_CHARACTERS} characters")
                pieces.append(piece)
        except (TemplateError, RecursionError, TypeError, ValueError, OverflowError, MemoryError) as error:
            raise InputError(f"chat template: {' '.join(str(error).split()) or type(error).__name__}") from None
        return "".join(pieces)


def _with_checks(environment: _Environment, source: str) -> nodes.Template:
    """Call ``check_time`` in every iteration and macro; imported by path, so that the template cannot redefine it."""
    tree = environment.parse(source)
    repeated: list[nodes.For | nodes.Macro] = [*tree.find_all(nodes.For), *tree.find_all(nodes.Macro)]
    for node in repeated:
        check = nodes.Call(nodes.ImportedName(f"{__name__}.{check_time.__name__}"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(check))
    tree.set_environment(environment)
    return tree


def check_time() -> None:
    """Stop a template that has used up its processor time."""
    if time.thread_time() > _deadline.get():
        raise SecurityError(f"not rendered within {MAX_SECONDS} s")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """As Hugging Face's templates expect it; Jinja's own escapes what HTML would."""
    if isinstance(indent, int) and indent > _MAX_INDENT:
        raise SecurityError(f"tojson: indent={indent} is more than {_MAX_INDENT}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
