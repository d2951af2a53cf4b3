"""What goes into the engine and what comes out: settings, tokens as they come, the outcome, the engine's figures.

A :class:`Request` is filled by the engine's thread and read by any others, in plain threads or in asyncio.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, Self, runtime_checkable

from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor

from benthic.config.complain import complaint
from benthic.config.schema import InferenceConfig
from benthic.errors import InputError, WorkFailed

MAX_TOP_LOGPROBS = 20
FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
TopLogprobs = tuple[tuple[int, float], ...]
"""Likeliest tokens and their log-probabilities, likeliest first."""

_Penalty = Annotated[float, Field(ge=-2, le=2)]
_TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
_TokenId = Annotated[int, Field(ge=0)]


@runtime_checkable
class Constraint(Protocol):
    """A grammar that says which tokens may come next. It belongs to one request; the engine calls it in order."""

    def mask(self, vocab_size: int) -> Tensor:
        """Tokens allowed now: bool (V,), or int32 (ceil(V / 32),) with the lowest bit first, as xgrammar packs them.

        Where nothing is allowed, the text ends with ``stop``.
        """

    def accept(self, token: int) -> None:
        """This token has come; one that ends the text is told as well."""


class Sampling(InferenceConfig):
    """Settings of one request.

    From the model's logits to the next token, in this order: bias, repetition penalty, presence and frequency
    penalties, constraint, temperature, ``top_k``, ``top_p``, ``min_p``.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    stop: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=1024)], ...], Field(max_length=16)] = ()
    """Strings that end the text; they are not part of it."""
    stop_token_ids: Annotated[tuple[_TokenId, ...], Field(max_length=256)] = ()
    """Tokens that end the text besides the tokenizer's own."""
    ignore_eos: bool = False
    """The tokenizer's end tokens are tokens like others; ``stop`` and ``stop_token_ids`` still end the text."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Equal seeds give equal text; by default every request differs."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Drop tokens less likely than this share of the likeliest (arXiv 2407.01082)."""
    presence_penalty: _Penalty = 0.0
    """Taken off the logit of each token that the completion has already."""
    frequency_penalty: _Penalty = 0.0
    """Taken off the logit of each token as often as the completion has it."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or completion (arXiv 1909.05858, 4.1)."""
    logit_bias: dict[_TokenId, Annotated[float, Field(ge=-100, le=100)]] = {}  # noqa: RUF012 - pydantic copies it
    """Added to the logits of single tokens."""
    top_logprobs: _TopLogprobs = 0
    """Alternatives to report for each token."""
    prompt_logprobs: _TopLogprobs | None = None
    """Score the prompt's own tokens too, with so many alternatives each; the prompt is then read whole."""
    constraint: Constraint | None = None
    """One object serves one request."""

    @classmethod
    def checked(cls, defaults: InferenceConfig, given: dict[str, Any]) -> Self:
        """The defaults with ``given`` over them; raises ``InputError`` if a key or value is wrong."""
        try:
            return cls.model_validate(defaults.model_dump() | given)
        except ValidationError as error:
            raise InputError(complaint(error, cls, "sampling")) from None


@dataclass(frozen=True)
class Token:
    """One token of a completion."""

    id: int
    text: str
    """What the token adds to the text; empty where a character or a possible stop string is not complete yet."""
    logprob: float
    """As the model gave it, before bias, penalties, temperature and cut-offs."""
    top_logprobs: TopLogprobs = ()


@dataclass(frozen=True)
class PromptToken:
    """One token of a scored prompt."""

    id: int
    logprob: float | None
    """None for the first, which nothing predicts."""
    top_logprobs: TopLogprobs = ()


def _figure(default: Any = 0) -> Any:
    return field(default=default, compare=False)


@dataclass(frozen=True)
class Completion:
    """What followed a prompt. Two are equal if the text and its probabilities are, whatever they cost."""

    text: str
    token_ids: tuple[int, ...]
    """Without the token that ended it."""
    logprobs: tuple[float, ...]
    """Log-probability of each token as the model gave it, before temperature and cut-offs."""
    finish_reason: FinishReason
    """``stop``: a token or string that ends the text; ``length``: as long as asked for, or as the model takes;
    ``cancelled``, ``deadline``, ``error``: what there was until then."""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    """Of each token; empty where none were asked for."""
    prompt_logprobs: tuple[PromptToken, ...] = ()
    """Empty where they were not asked for."""
    error: str | None = None
    """One line, with ``error``."""
    prompt_tokens: int = _figure()
    cached_tokens: int = _figure()
    """Tokens of the prompt that an earlier request had read."""
    drafted_tokens: int = _figure()
    accepted_tokens: int = _figure()
    """Drafts of the MTP modules that turned out to be the next token."""
    preemptions: int = _figure()
    queue_s: float = _figure(0.0)
    """From submission to the first work on it."""
    first_token_s: float | None = _figure(None)
    """From submission to the first token."""
    total_s: float = _figure(0.0)

    @property
    def acceptance(self) -> float | None:
        """Share of drafted tokens that were accepted; None if there were none."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None


class QueueFull(WorkFailed):
    """As many requests wait as may; the caller should try again later."""


@dataclass(frozen=True)
class EngineStats:
    """Figures of an engine at one moment; counters only ever grow."""

    running: int
    waiting: int
    max_batch: int
    max_queue: int
    pages_total: int
    pages_used: int
    """Held by running requests."""
    pages_cached: int
    """Held by nobody, but kept for prompts that begin like an earlier one; free for the taking."""
    page_bytes: int
    prompt_tokens: int
    """Of admitted requests, the cached ones included."""
    cached_tokens: int
    """Prompt tokens that were found in the cache."""
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    preemptions: int
    evictions: int
    """Cached chunks given up for room."""
    steps: int
    prefill_s: float
    decode_s: float
    draft_s: float
    finished: dict[FinishReason, int]
    decoder: str
    """Which decode path runs, in words."""
    reader: str
    """Which kernels read prompts, in words."""
    draft_depth: float
    """Mean drafts a decoding request had in the last step."""


class Request:
    """A prompt at work. Iterate over it for its tokens, with ``for`` or ``async for``; then read ``result``.

    Tokens are kept, so that several readers, and late ones, see all of them.
    """

    def __init__(self, identity: str, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        self.id, self.prompt_ids, self.sampling = identity, tuple(prompt_ids), sampling
        self._changed = threading.Condition()
        self._tokens: list[Token] = []
        self._result: Completion | None = None
        self._waiters: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._cancelled = threading.Event()

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return self._result is not None

    @property
    def result(self) -> Completion:
        """The outcome; raises ``RuntimeError`` before the end."""
        if self._result is None:
            raise RuntimeError(f"request {self.id} has not ended")
        return self._result

    def wait(self, timeout_s: float | None = None) -> Completion:
        """Block until the end and return the result; raises ``TimeoutError``."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._result is not None, timeout_s):
                raise TimeoutError(f"request {self.id} has not ended within {timeout_s:g} s")
        return self.result

    def cancel(self) -> None:
        """End it as soon as the current step is over; nothing happens if it has ended."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` has been called."""
        return self._cancelled.is_set()

    def available(self, start: int = 0) -> list[Token]:
        """Tokens from index ``start`` that are there already, without waiting."""
        with self._changed:
            return self._tokens[start:]

    def __iter__(self) -> Iterator[Token]:
        at = 0
        while True:
            with self._changed:
                while len(self._tokens) == at and not self.done:
                    self._changed.wait()
                new, done = self._tokens[at:], self.done
            yield from new
            at += len(new)
            if done:
                return

    async def __aiter__(self) -> AsyncIterator[Token]:
        at, waiter = 0, (asyncio.get_running_loop(), asyncio.Event())
        with self._changed:
            self._waiters.add(waiter)
        try:
            while True:
                waiter[1].clear()
                with self._changed:
                    new, done = self._tokens[at:], self.done
                for token in new:
                    yield token
                at += len(new)
                if done:
                    return
                if not new:
                    await waiter[1].wait()
        finally:
            with self._changed:
                self._waiters.discard(waiter)

    def deliver(self, tokens: list[Token], result: Completion | None = None) -> None:
        """For the engine: add tokens and, at the end, the result."""
        with self._changed:
            self._tokens += tokens
            self._result = result or self._result
            self._changed.notify_all()
            for loop, event in self._waiters:
                with suppress(RuntimeError):  # the reader's loop has closed meanwhile
                    loop.call_soon_threadsafe(event.set)
