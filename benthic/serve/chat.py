"""Conversations: the shapes of ``/v1/chat/completions``, whole or streamed."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from benthic.inference.request import Completion, Token
from benthic.serve import answers
from benthic.serve.generation import Generation
from benthic.serve.models import Served
from benthic.serve.requests import ChatRequest, FunctionCall
from benthic.serve.stream import DONE, event
from benthic.serve.tools import Style, ToolScanner, call_of_json, style_of


class ForcedCall:
    """Reads an answer that a grammar has made to be one call, in the manner of :class:`ToolScanner`."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, piece: str) -> str:
        """Nothing of a call is content."""
        self._text += piece
        return ""

    broken_off = False
    """It is there as a whole or not at all."""

    def finish(self) -> tuple[str, list[FunctionCall]]:
        """The call; of one that was broken off, what there is of it, as content."""
        call = call_of_json(self._text)
        return ("", [call]) if call else (self._text, [])


class PlainText:
    """Reads an answer in which there are no calls."""

    def push(self, piece: str) -> str:
        """All is content."""
        return piece

    broken_off = False

    def finish(self) -> tuple[str, list[FunctionCall]]:
        """Nothing more."""
        return "", []


Scanner = ToolScanner | ForcedCall | PlainText


def scanner_for(asked: ChatRequest, style: Style) -> Scanner:
    """What reads each choice of an answer."""
    if asked.forced_tools:
        return ForcedCall()
    if names := [tool.function.name for tool in asked.usable_tools]:
        return ToolScanner(style, names, one_only=asked.parallel_tool_calls is False)
    return PlainText()


def _reason(completion: Completion, calls: Sequence[FunctionCall], scanner: Scanner) -> str:
    """Why an answer has ended: with calls, unless there was no room for the rest of them."""
    cut = completion.finish_reason == "length" and scanner.broken_off
    return "tool_calls" if calls and not cut else completion.finish_reason


def whole(served: Served, asked: ChatRequest, completions: Sequence[Completion]) -> dict[str, Any]:
    """The answer in one piece."""
    choices = [_choice(served, asked, number, one) for number, one in enumerate(completions)]
    head = answers.head("chat.completion", "chatcmpl", served.name)
    return {**head, "choices": choices, "usage": answers.usage(completions, completions[:1])}


def _choice(served: Served, asked: ChatRequest, number: int, completion: Completion) -> dict[str, Any]:
    scanner = scanner_for(asked, style_of(served.tokenizer.chat_template))
    content = scanner.push(completion.text)
    rest, calls = scanner.finish()
    content += rest
    logprobs = None
    if asked.logprobs:
        tops = completion.top_logprobs or ((),) * len(completion.token_ids)
        tokens = zip(completion.token_ids, completion.logprobs, tops, strict=True)
        logprobs = answers.chat_logprobs(served.tokenizer, tokens)
    reason = _reason(completion, calls, scanner)
    message = answers.message(content or (None if calls else ""), calls)
    return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": reason}


async def streamed(served: Served, asked: ChatRequest, generation: Generation) -> AsyncIterator[bytes]:
    """The answer as events. Raises ApiError when a choice fails."""
    writer = _Writer(served, asked)
    for number in range(len(generation.requests)):
        yield writer.chunk(number, {"role": "assistant", "content": "", "refusal": None})
    completions = []
    async for number, token in generation.tokens():
        if token is not None:
            for chunk in writer.token(number, token):
                yield chunk
        else:
            completions.append(completion := generation.outcome(generation.requests[number]))
            for chunk in writer.end(number, completion):
                yield chunk
    if asked.include_usage:
        yield event({**writer.head, "choices": [], "usage": answers.usage(completions, completions[:1])})
    yield DONE


class _Writer:
    def __init__(self, served: Served, asked: ChatRequest) -> None:
        self.head = answers.head("chat.completion.chunk", "chatcmpl", served.name)
        style = style_of(served.tokenizer.chat_template)
        self._served, self._asked = served, asked
        self._scanners = [scanner_for(asked, style) for _ in range(asked.n or 1)]
        self._read = [0] * (asked.n or 1)
        """Characters of each choice's text so far."""

    def chunk(self, number: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> bytes:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self._asked.include_usage else {}
        return event({**self.head, "choices": [choice], **usage})

    def token(self, number: int, token: Token) -> list[bytes]:
        logprobs = None
        if self._asked.logprobs:
            row = (token.id, token.logprob, token.top_logprobs)
            logprobs = answers.chat_logprobs(self._served.tokenizer, [row])
        self._read[number] += len(token.text)
        piece = self._scanners[number].push(token.text)
        return [self.chunk(number, {"content": piece} if piece else {}, logprobs)] if piece or logprobs else []

    def end(self, number: int, completion: Completion) -> list[bytes]:
        # What might have become a stop string is known to be none only now.
        held = self._scanners[number].push(completion.text[self._read[number] :])
        rest, calls = self._scanners[number].finish()
        rest = held + rest
        chunks = [self.chunk(number, {"content": rest})] if rest else []
        chunks += [
            self.chunk(number, {"tool_calls": [{"index": index, **answers.tool_call(call)}]})
            for index, call in enumerate(calls)
        ]
        return [*chunks, self.chunk(number, {}, None, _reason(completion, calls, self._scanners[number]))]
