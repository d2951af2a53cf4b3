"""Chat templates, which may come with a model from anywhere, rendered in a sandbox and with bounded work."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError, meta
from jinja2.exceptions import SecurityError

from benthic.data.template_sandbox import MAX_CHARACTERS, Sandbox, begin, size_of
from benthic.errors import InputError

Message = Mapping[str, Any]
MAX_SOURCE = 256 << 10
"""Characters of the longest template that is compiled; published ones have up to some ten thousand."""

_MAX_INDENT = 16

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


class ChatTemplate:
    """A compiled Jinja template with the names Hugging Face templates expect.

    Raises ``InputError`` for a template that cannot be compiled.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise InputError(f"chat template: {len(source)} characters; at most {MAX_SOURCE} are read")
        sandbox = Sandbox()
        sandbox.globals.update(raise_exception=_raise, strftime_now=time.strftime)
        sandbox.filters["tojson"] = _to_json
        try:
            self._template = sandbox.compile_checked(source)
            self.names = frozenset(meta.find_undeclared_variables(sandbox.parse(source)))
            """Names it reads besides those it sets, such as ``messages``."""
        except (TemplateError, RecursionError) as error:
            raise InputError(f"chat template: {error}") from None

    def render(self, messages: Sequence[Message], **names: Any) -> str:
        """The prompt as text; raises ``InputError`` with the template's own complaint, or when it does too much."""
        begin()
        try:
            prompt: str = self._template.render(messages=messages, **names)
        except (TemplateError, RecursionError, TypeError, ValueError, OverflowError, MemoryError) as error:
            raise InputError(f"chat template: {' '.join(str(error).split()) or type(error).__name__}") from None
        return prompt


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """As Hugging Face's templates expect it; Jinja's own escapes what HTML would."""
    if isinstance(indent, int) and indent > _MAX_INDENT:
        raise SecurityError(f"tojson: indent={indent} is more than {_MAX_INDENT}")
    if size_of(value) > MAX_CHARACTERS:
        raise SecurityError("tojson: value too large for a chat template")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
