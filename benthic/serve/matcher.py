"""Grammars by llguidance: the part that needs no PyTorch, for the server and for the process that compiles first."""

import json
from collections.abc import Sequence
from typing import Any

from benthic.errors import MissingExtra

CALL, END_OF_CALL = "<tool_call>", "</tool_call>"
"""Around a call, in the form of Hermes."""
_COMPACT = {"whitespace_flexible": False}
"""Flexible, a model might write spaces for ever."""


def load_tokenizer(tokenizer_json: str, vocab_size: int, stop_ids: Sequence[int]) -> Any:
    """The library's view of a tokenizer."""
    try:
        from llguidance import LLTokenizer
    except ImportError:
        raise MissingExtra("llguidance", "serve") from None
    return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(stop_ids))


def build_matcher(tokenizer: Any, source: str) -> Any:
    """A matcher, or one line that says what is wrong.

    ``source`` is ``{"schema": ...}``, ``{"regex": ...}``, or ``{"schema": ..., "call": ..., "several": ...}``: JSON
    after the first schema, or calls after the second, each between Hermes' marks.
    """
    from llguidance import LLMatcher, LLParserLimits

    given = json.loads(source)
    try:
        if "regex" in given:
            grammar = LLMatcher.grammar_from_regex(given["regex"])
        elif "call" in given:
            grammar = LLMatcher.grammar_from_lark(_answer_or_calls(given["schema"], given["call"], given["several"]))
        else:
            options: Any = {**_COMPACT, "lenient": given["lenient"], "coerce_one_of": given["lenient"]}
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(given["schema"]), overrides=options)
    except ValueError as error:
        return _line(error)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if not matcher.is_error():
        matcher.compute_bitmask()  # the first one does the rest of the compilation
    return _line(matcher.get_error()) if matcher.is_error() else matcher


def _answer_or_calls(answer: dict[str, Any], call: dict[str, Any], several: bool) -> str:
    further = "(GAP call)*" if several else ""
    answer, call = ({**schema, "x-guidance": _COMPACT} for schema in (answer, call))
    return f"""start: answer | call {further}
answer: %json {json.dumps(answer)}
call: "{CALL}" GAP body GAP "{END_OF_CALL}"
body: %json {json.dumps(call)}
GAP: /\\n?/
"""


def _line(error: object) -> str:
    if str(error).startswith("NoExtension"):
        return "nothing satisfies it"
    return " ".join(str(error).split("\n<state>")[0].split())[:300] or "not valid"
