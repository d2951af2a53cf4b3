"""Chat templates, which may come with a model from anywhere, rendered in a sandbox and with bounded work."""

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
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or any(isinstance(side, int) and side > MAX_FACTOR for side in (left, right)):
            raise SecurityError("arithmetic too large for a chat template")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A compiled Jinja template with the names Hugging Face templates expect.

    Raises ``InputError`` for a template that cannot be compiled.
    """

    def __init__(self, source: str) -> None:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals.update(raise_exception=_raise, strftime_now=time.strftime)
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


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
