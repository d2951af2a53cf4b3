"""What goes back to a client: choices, log-probabilities and usage in the shapes of OpenAI's API."""

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from benthic import __version__
from benthic.data.stream_decoder import StreamDecoder
from benthic.data.tokenizer import Tokenizer
from benthic.inference.request import Completion, PromptToken, Token, TopLogprobs
from benthic.serve.requests import FunctionCall

_LEAST = -9999.0
"""Stands for a log-probability of minus infinity, which JSON cannot hold."""


def head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """What all parts of an answer have in common."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model,
        "system_fingerprint": f"benthic-{__version__}",
    }  # fmt: skip


def usage(completions: Sequence[Completion], first_choices: Sequence[Completion], *, silent: bool = False) -> Any:
    """Tokens in and out.

    Args:
        completions: all choices.
        first_choices: one for each prompt, which counts once however many choices it has.
        silent: nothing of what was written is part of the answer.
    """
    prompt = sum(one.prompt_tokens for one in first_choices)
    written = 0 if silent else sum(len(one.token_ids) for one in completions)
    accepted = sum(one.accepted_tokens for one in completions)
    drafted = sum(one.drafted_tokens for one in completions)
    return {
        "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in first_choices)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted,
        },
    }  # fmt: skip


def message(content: str | None, calls: Sequence[FunctionCall]) -> dict[str, Any]:
    """An assistant's message."""
    said: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    return said | {"tool_calls": [tool_call(call) for call in calls]} if calls else said


def tool_call(call: FunctionCall) -> dict[str, Any]:
    """A call, with a new id."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[tuple[int, float, TopLogprobs]]) -> dict[str, Any]:
    """Log-probabilities of tokens as a chat has them."""
    content = [
        {**_chat_token(tokenizer, index, logprob), "top_logprobs": [_chat_token(tokenizer, *one) for one in top]}
        for index, logprob, top in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: Tokenizer, index: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(index)
    return {"token": raw.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(raw)}


class TextLogprobs:
    """Log-probabilities as ``/v1/completions`` has them, with the place of each token in the text.

    Tokens that share a character have the place where it stands.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._text, self._written = tokenizer, StreamDecoder(tokenizer), 0

    def of(self, tokens: Iterable[Token | PromptToken]) -> dict[str, Any]:
        """Of further tokens of the same text."""
        columns: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            name = self._name(token.id)
            columns["tokens"].append(name)
            # Of a text's first token nothing is known. OpenAI's schema allows no null there; a sum is right with 0.
            columns["token_logprobs"].append(0.0 if token.logprob is None else _finite(token.logprob))
            columns["top_logprobs"].append(self._alternatives(name, token))
            held = len(self._text.finish()) if self._text.holding else 0
            columns["text_offset"].append(self._written + held)
            self._written += len(self._text.push(token.id))
        return columns

    def _alternatives(self, name: str, token: Token | PromptToken) -> dict[str, float]:
        """By name, the likelier one where two have the same, and in any case the token itself."""
        if token.logprob is None:
            return {}
        found: dict[str, float] = {}
        for index, logprob in token.top_logprobs:
            found.setdefault(self._name(index), _finite(logprob))
        return {name: _finite(token.logprob)} | found

    def _name(self, index: int) -> str:
        raw = self._tokenizer.token_bytes(index)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
