"""A Jinja sandbox in which a template can neither run code, nor work for long, nor fill the memory.

Jinja's own sandbox keeps a template away from Python, but lets ``'x'.center(10**10)`` through, and doublings such as
``x ~ x`` in a loop. Here all that goes into a call, filter, operator, comparison or output is measured first.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_SECONDS = 1.0
MAX_CHARACTERS = 16 << 20
"""Of all that a template writes, and of the values that it works with, written out."""

_ITEM = 64
"""Characters that anything but text counts for."""
_AMPLIFIERS = {
    "batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "round", "slice", "wordwrap",
    "zfill",
}  # fmt: skip
"""Filters and methods whose result may be as large as the product of their arguments."""
_REFUSED = {"format", "format_map", "pprint", "translate", "urlize"}
"""Filters and methods whose result or work has no simple bound."""

_SCOPES = ("_loop_vars", "_block_vars")
"""Keywords with which compiled templates hand on the variables of a loop or block."""


class _Meter:
    """What is left of the time and the characters of one rendering."""

    def __init__(self) -> None:
        self.deadline = time.thread_time() + MAX_SECONDS
        self.written = 0


_meter: ContextVar[_Meter] = ContextVar("meter")


def begin() -> None:
    """Start the account of a rendering, in this thread."""
    _meter.set(_Meter())


def check_time() -> None:
    """Stop a template that has used up its processor time."""
    if time.thread_time() > _meter.get().deadline:
        raise SecurityError(f"not rendered within {MAX_SECONDS} s")


def same(value: Any) -> Any:
    """The value itself; that it goes through a call has it measured."""
    return value


def joined(*values: Any) -> str:
    """What ``~`` does."""
    return "".join(map(str, values))


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with every operation measured. Templates are compiled by :meth:`compile_checked`."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        # Not optimised: what is computed while compiling would escape the account.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=_written, optimized=False
        )
        del self.globals["lipsum"]
        self.filters = {name: _measured(name, function) for name, function in self.filters.items()}

    def compile_checked(self, source: str) -> Any:
        """A template in which loops and macros check the time and all text is counted."""
        tree = self.parse(source)
        for repeated in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            assert isinstance(repeated, nodes.For | nodes.Macro | nodes.CallBlock)
            repeated.body.insert(0, nodes.ExprStmt(_call(check_time)))
        for output in list(tree.find_all(nodes.Output)):
            output.nodes = [_literal(node) if isinstance(node, nodes.TemplateData) else node for node in output.nodes]
        sides: list[nodes.Compare | nodes.Operand] = [*tree.find_all(nodes.Compare), *tree.find_all(nodes.Operand)]
        for side in sides:
            side.expr = _call(same, side.expr)
        _replace_concatenations(tree)
        tree.set_environment(self)
        return self.from_string(tree)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call from within a template, once the arguments and the object of a method are known to be small."""
        owner = getattr(function, "__self__", None)
        values = [*args, *(value for name, value in kwargs.items() if name not in _SCOPES)]
        # Jinja puts a function of the same name in the place of str.format.
        name = getattr(function, "__name__", "") if not isinstance(function, Macro) else ""
        _check_operation(name, [owner, *values] if isinstance(owner, str) else values)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """``*``, ``+`` and so on, of numbers and text that stay small."""
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"{operator} is not for a chat template")
        if operator == "*":
            _check_product([left, right])
        _check_size([left, right])
        return super().call_binop(context, operator, left, right)


@pass_context
def _written(_: Any, value: Any) -> Any:
    """Jinja calls it with every value that is written, be it into a variable, a macro's result or the prompt."""
    meter = _meter.get()
    meter.written += size_of(value)
    if meter.written > MAX_CHARACTERS:
        raise SecurityError(f"more than {MAX_CHARACTERS} characters")
    return value


def _measured(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # with the mark that says whether Jinja passes the context
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_time()
        _check_operation(name, [*args, *kwargs.values()])
        return function(*args, **kwargs)

    return checked


def _check_operation(name: str, values: Collection[Any]) -> None:
    if name in _REFUSED:
        raise SecurityError(f"{name} is not for a chat template")
    if name in _AMPLIFIERS:
        _check_product(values)
    _check_size(values)


def _check_size(values: Iterable[Any]) -> None:
    if size_of(list(values)) > MAX_CHARACTERS:
        raise SecurityError("values too large for a chat template")


def _check_product(values: Iterable[Any]) -> None:
    """Refuse text or lists times numbers, or times other text, that could fill the memory."""
    product = 1
    for value in values:
        product *= max(1, abs(value) if isinstance(value, int) else size_of(value))
        if product > MAX_CHARACTERS:
            raise SecurityError("the result would be too large for a chat template")


def size_of(value: Any) -> int:
    """Characters of a value written out, roughly; counting stops beyond ``MAX_CHARACTERS``."""
    pending, size = [value], 0
    while pending and size <= MAX_CHARACTERS:
        item = pending.pop()
        if isinstance(item, str | bytes):
            size += len(item)
            continue
        parts = _parts(item)
        size += _ITEM * (1 + len(parts)) + (item.bit_length() if isinstance(item, int) else 0)
        if size <= MAX_CHARACTERS:
            pending.extend(parts)
    return size


def _parts(item: Any) -> Collection[Any]:
    if isinstance(item, Namespace):
        item = object.__getattribute__(item, "_Namespace__attrs")
    if isinstance(item, Mapping):
        return [part for pair in item.items() for part in pair]
    return item if isinstance(item, list | tuple | set | frozenset) else ()


def _call(function: Callable[..., Any], *args: nodes.Expr) -> nodes.Call:
    """A call by import path, so that a template cannot redefine what is called."""
    return nodes.Call(nodes.ImportedName(f"{__name__}.{function.__name__}"), list(args), [], None, None)


def _literal(text: nodes.TemplateData) -> nodes.Expr:
    """The template's own text as a value, which is counted each time it is written."""
    return nodes.Const(text.data)


def _replace_concatenations(node: nodes.Node) -> None:
    """Put calls of :func:`joined` in the place of ``~``, below ``node``."""
    for field, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, field, [_without_concatenation(item) for item in value])
        else:
            setattr(node, field, _without_concatenation(value))


def _without_concatenation(value: Any) -> Any:
    if not isinstance(value, nodes.Node):
        return value
    _replace_concatenations(value)
    return _call(joined, *value.nodes) if isinstance(value, nodes.Concat) else value
