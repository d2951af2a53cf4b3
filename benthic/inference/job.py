"""A request as the scheduler sees it: what it has read and written, the pages it holds, what it needs next."""

import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from benthic.data.tokenizer import Tokenizer
from benthic.inference.pace import Acceptance
from benthic.inference.paged_cache import pages_for
from benthic.inference.pages import Chunk, chain_key, root_key
from benthic.inference.request import Completion, FinishReason, PromptToken, Request, Token
from benthic.inference.sampling import Sampler
from benthic.inference.text import TextStream


class Waiting:
    """Hidden states of consecutive positions that a module has still to read."""

    def __init__(self) -> None:
        self.start, self._hidden_TD = 0, torch.empty(0)

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.start + len(self)

    def __len__(self) -> int:
        return len(self._hidden_TD)

    def __contains__(self, position: int) -> bool:
        return self.start <= position < self.end

    def put(self, start: int, hidden_TD: Tensor) -> None:
        """States from position ``start`` on: whatever was there or beyond is given up, and what does not reach them."""
        if self.start < start <= self.end:
            self._hidden_TD = torch.cat((self._hidden_TD[: start - self.start], hidden_TD))
        else:
            self.start, self._hidden_TD = start, hidden_TD

    def first(self, count: int) -> Tensor:
        """The states (count, D) of the first positions."""
        return self._hidden_TD[:count]

    def drop(self, count: int) -> None:
        """The first so many have been read for good."""
        # An empty part of a chunk's states would keep all of them in memory.
        self._hidden_TD = self._hidden_TD[count:] if count < len(self) else torch.empty(0)
        self.start += count


class Drafting:
    """Hidden states that a request's MTP modules have still to join with the tokens after them.

    ``waiting[k]`` holds what module k has to read: its last entries wait for a token, or have been read with a draft in
    its place.
    """

    def __init__(self, modules: int, acceptance: Acceptance) -> None:
        self.waiting = [Waiting() for _ in range(modules)]
        self.acceptance = acceptance


class Job:
    """One request and all that it needs to run."""

    def __init__(
        self, request: Request, tokenizer: Tokenizer, *, number: int, priority: int, deadline_s: float | None,
        scope: str, limit: int, vocab_size: int, chunk: int,
    ) -> None:  # fmt: skip
        self.request, self.sampling = request, request.sampling
        self.priority, self.rank = priority, (-priority, number)
        """Jobs of lower rank come first."""
        self.ids = list(request.prompt_ids)
        self.prompt_length, self.limit = len(self.ids), limit
        self.read = 0
        """Tokens whose latents are in the cache."""
        self.sampler = Sampler(request.sampling, self.ids, vocab_size)
        self.text = TextStream(tokenizer, request.sampling.stop)
        own = () if request.sampling.ignore_eos else tokenizer.stop_ids
        self.stop_ids = frozenset({*own, *request.sampling.stop_token_ids})
        self.drafting: Drafting | None = None
        self.tokens: list[Token] = []
        self.scores: list[PromptToken] = []
        self.pages: list[int] = []
        """Pages it holds alone."""
        self.chunks: list[Chunk] = []
        self.table = np.full(pages_for(limit), -1, np.int32)
        self.table_P = torch.from_numpy(self.table)
        """The same memory, for what wants a tensor."""
        self.page_count = 0
        self.cached_tokens = self.drafted = self.accepted = self.preemptions = 0
        self._keys, self._chunk, self._scope = list[bytes](), chunk, scope
        self._submitted = time.monotonic()
        self.deadline = None if deadline_s is None else self._submitted + deadline_s
        self._started: float | None = None
        self._first_token: float | None = None

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt has been read."""
        return self.read >= self.prompt_length

    @property
    def outstanding_pages(self) -> int:
        """Pages it still has to take for what is known of it, and the token after that unless it is the last."""
        return max(0, pages_for(min(len(self.ids) + 1, self.limit - 1)) - self.page_count)

    def start(self) -> None:
        """It is being worked on, perhaps again."""
        self._started = self._started or time.monotonic()

    def take(self, pages: Sequence[int]) -> None:
        """Further pages of its own for the tokens to come."""
        self._add(pages)
        self.pages += pages

    def use(self, chunk: Chunk) -> None:
        """A chunk that others use too, for the tokens to come."""
        self._add(chunk.pages)
        self.chunks.append(chunk)

    def _add(self, pages: Sequence[int]) -> None:
        end = self.page_count + len(pages)
        self.table[self.page_count : end] = pages
        self.page_count = end

    def forget_pages(self) -> None:
        """It holds none any more and has to read everything again."""
        self.pages, self.chunks, self.page_count, self.read = [], [], 0, 0
        self.table.fill(-1)
        if self.drafting is not None:
            self.drafting = Drafting(len(self.drafting.waiting), self.drafting.acceptance)

    def keys_ahead(self) -> Iterable[bytes]:
        """Keys of the chunks that it has still to read and may share with others, in order."""
        if self.sampling.prompt_logprobs is None:
            for end in range(self.read + self._chunk, self.prompt_length + 1, self._chunk):
                if end < len(self.ids):  # a token is left to begin the answer from
                    yield self.chunk_key(end // self._chunk - 1)

    def chunk_key(self, index: int) -> bytes:
        """Key of one whole chunk of the prompt."""
        while len(self._keys) <= index:
            before = self._keys[-1] if self._keys else root_key(self._scope)
            at = len(self._keys) * self._chunk
            self._keys.append(chain_key(before, self.ids[at : at + self._chunk]))
        return self._keys[index]

    def add_token(self, token: Token) -> list[Token]:
        """The next token has been chosen; returns those that can go out, with their text."""
        self._first_token = self._first_token or time.monotonic()
        self.ids.append(token.id)
        self.tokens.append(token)
        return self.text.push(token)

    def outcome(self, reason: FinishReason, error: str | None) -> Completion:
        """The completion, once the text is finished."""
        now, since = time.monotonic(), self._submitted
        return Completion(
            self.text.text,
            tuple(token.id for token in self.tokens),
            tuple(token.logprob for token in self.tokens),
            reason,
            top_logprobs=tuple(t.top_logprobs for t in self.tokens) if self.sampling.top_logprobs else (),
            prompt_logprobs=tuple(self.scores),
            error=error,
            prompt_tokens=self.prompt_length,
            cached_tokens=self.cached_tokens,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            preemptions=self.preemptions,
            queue_s=(self._started or now) - since,
            first_token_s=None if self._first_token is None else self._first_token - since,
            total_s=now - since,
        )
