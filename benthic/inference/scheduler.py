"""The heart of the engine: which requests run, what each step computes, and where its memory comes from.

A step reads at most a chunk's worth of prompts and then decodes one row, or several with drafts, for each request whose
prompt is read. What a request computes never depends on the others:

- a prompt is read alone, in chunks that begin at fixed multiples of the chunk's length;
- tokens after it are decoded row by row, and rows do not see each other;
- only chunks of prompts are shared, which whoever reads them computes alike;
- a request that had to give up its pages reads its prompt in the same chunks again, and its own tokens by decoding.

So tokens and log-probabilities are the same, to the last bit, in any company.
"""

import bisect
import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import TypedDict, get_args

import torch
from torch import Tensor

from benthic.config.schema import ModelConfig
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError, WorkFailed
from benthic.inference.decode import decoder
from benthic.inference.drafter import FEW, Drafter, tables
from benthic.inference.huge_pages import use_huge_pages
from benthic.inference.job import Drafting, Job, pages_for
from benthic.inference.pace import Pace
from benthic.inference.paged_cache import PAGE, PagedCache, PagedView
from benthic.inference.pages import PagePool
from benthic.inference.request import EngineStats, FinishReason, PromptToken, Request, Sampling, Token
from benthic.inference.sampling import log_probabilities, top_of
from benthic.model import LanguageModel
from benthic.precision.quantise import PRECISIONS, Precision

_REPLAY = 16
"""Tokens of its own that a preempted request decodes again in one step."""
_MOST_UNDRAFTED = 128
"""Positions that MTP modules may lag behind while nothing is drafted."""
_SCORED_AT_ONCE = 64
"""Prompt tokens whose logits are held at a time."""


class Options(TypedDict, total=False):
    """How much an engine takes on; what is not given is as :class:`Scheduler` has it."""

    cache_gib: float
    max_batch: int
    max_draft: int
    cache_dtype: torch.dtype | None
    precision: Precision | None


def chunk_length(config: ModelConfig) -> int:
    """Tokens of a prompt that are read at once and shared as one: an eighth of the longest text, 64 to 512."""
    return min(max(config.max_position_embeddings // 8 // PAGE, 1) * PAGE, 512)


class Scheduler:
    """Runs requests on one model, a step at a time, in whichever single thread calls :meth:`step`.

    Args:
        model: stays on its device and in its precision.
        tokenizer: the one the model was trained with.
        cache_gib: memory of the latent cache, in GiB.
        max_batch: requests that run at once.
        max_draft: tokens the MTP modules may draft ahead; 0 switches them off.
        cache_dtype: of the cached latents, fp32 or bf16; by default that of the weights.
        precision: that weights are kept in for decoding, by default their own; the model's are rounded to it.

    Raises:
        InputError: a limit or the precision is wrong, or the memory holds not even one page.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, *, cache_gib: float = 1.0, max_batch: int = 16,
        max_draft: int = 3, cache_dtype: torch.dtype | None = None, precision: Precision | None = None,
    ) -> None:  # fmt: skip
        for name, value, least in (("max_batch", max_batch, 1), ("max_draft", max_draft, 0)):
            if value < least:
                raise InputError(f"{name}={value}: must be at least {least}")
        if precision not in (None, *PRECISIONS):
            raise InputError(f"precision={precision}: must be one of {', '.join(PRECISIONS)}")
        if cache_dtype not in (None, torch.float32, torch.bfloat16):
            raise InputError(f"cache_dtype={cache_dtype}: must be torch.float32 or torch.bfloat16")
        self.model, self.config, self.tokenizer = model.eval(), model.config, tokenizer
        self.max_batch, self.chunk = max_batch, chunk_length(model.config)
        self.pace = Pace(max_draft if len(model.mtp) else 0)
        self.cache = _cache(model, cache_gib, cache_dtype, mtp_layers=len(model.mtp) if max_draft else 0)
        use_huge_pages(model)
        self._decoder = decoder(model, precision)
        self._drafter = Drafter(model, self._decoder, self.cache)
        self._pool = PagePool(self.cache.pages)
        self._lock = threading.Lock()
        self._inbox: list[Job] = []
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._numbers = itertools.count()
        self._counts: Counter[str] = Counter()
        self._finished: dict[FinishReason, int] = dict.fromkeys(get_args(FinishReason), 0)
        self._seconds = {"prefill": 0.0, "decode": 0.0, "draft": 0.0}
        self._draft_depth = 0.0

    # ------------------------------------------------------------------ from any thread

    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, priority: int = 0, deadline_s: float | None = None,
        scope: str = "",
    ) -> Request:  # fmt: skip
        """Queue a prompt; raises ``InputError`` if it can never run."""
        ids = list(prompt_ids)
        limit = self.check(ids, sampling)
        number = next(self._numbers)
        request = Request(f"req-{number}", ids, sampling)
        job = Job(
            request, self.tokenizer, number=number, priority=priority, deadline_s=deadline_s, scope=scope, limit=limit,
            vocab_size=self.config.vocab_size, chunk=self.chunk,
        )  # fmt: skip
        with self._lock:
            self._inbox.append(job)
        return request

    def check(self, ids: Sequence[int], sampling: Sampling) -> int:
        """Tokens that prompt and answer have at most together; raises ``InputError`` if the request can never run."""
        check_request(self.config, ids, sampling)
        limit = min(len(ids) + sampling.max_new_tokens, self.config.max_position_embeddings)
        needed = pages_for(limit - 1)
        if needed > self.cache.pages:
            raise InputError(
                f"prompt: {len(ids)} tokens and max_new_tokens={limit - len(ids)} take {needed} pages of {PAGE} "
                f"tokens; the cache has {self.cache.pages}: ask for fewer tokens, or start with a larger cache_gib"
            )
        return limit

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._inbox or self._waiting or self._running)

    @property
    def waiting(self) -> int:
        """Requests that do not run yet, or not at the moment."""
        return len(self._inbox) + len(self._waiting)

    def stats(self, max_queue: int = 0) -> EngineStats:
        """Figures of this moment."""
        counts = self._counts
        pool = self._pool
        return EngineStats(
            running=len(self._running), waiting=self.waiting, max_batch=self.max_batch, max_queue=max_queue,
            pages_total=pool.total, pages_used=pool.used, pages_cached=pool.cached, page_bytes=self.cache.bytes_a_page,
            prompt_tokens=counts["prompt"], cached_tokens=counts["cached"], generated_tokens=counts["generated"],
            drafted_tokens=counts["drafted"], accepted_tokens=counts["accepted"], preemptions=counts["preemptions"],
            evictions=pool.evictions, steps=counts["steps"], prefill_s=self._seconds["prefill"],
            decode_s=self._seconds["decode"], draft_s=self._seconds["draft"], finished=dict(self._finished),
            decoder=self._decoder.name, draft_depth=self._draft_depth,
        )  # fmt: skip

    # ------------------------------------------------------------------ from the thread that steps

    @torch.inference_mode()
    def step(self) -> None:
        """Admit, read some of the prompts, decode a token or more for each of the rest."""
        with self._lock:
            arrived, self._inbox = self._inbox, []
            for job in arrived:
                bisect.insort(self._waiting, job, key=lambda job: job.rank)
        self._end_cancelled_and_late()
        self._admit()
        self._counts["steps"] += 1
        self._read_prompts()
        self._decode()

    def end_all(self, reason: FinishReason, error: str | None = None) -> None:
        """End every request, whatever it was doing, and begin with an empty cache."""
        with self._lock:
            jobs = [*self._running, *self._waiting, *self._inbox]
            self._running, self._waiting, self._inbox = [], [], []
        evictions = self._pool.evictions
        self._pool = PagePool(self.cache.pages)
        self._pool.evictions = evictions
        for job in jobs:
            self._deliver_end(job, reason, error)

    def _end_cancelled_and_late(self) -> None:
        now = time.monotonic()
        for job in [*self._waiting, *self._running]:
            if job.request.cancelled:
                self._finish(job, "cancelled")
            elif job.deadline is not None and now >= job.deadline:
                self._finish(job, "deadline")

    # admission and memory

    def _admit(self) -> None:
        """Move requests from the queue into the batch, in order; a more urgent one takes a less urgent one's place."""
        while self._waiting:
            job = self._waiting[0]
            if len(self._running) < self.max_batch and self._has_room_for(job):
                self._running.append(self._waiting.pop(0))
                self._begin(job)
                continue
            victim = max(self._running, key=lambda other: other.rank)
            if victim.priority >= job.priority:
                return
            self._preempt(victim)

    def _begin(self, job: Job) -> None:
        job.start()
        if job.preemptions:
            return
        self._counts["prompt"] += job.prompt_length
        acceptance = self.pace.new_request()
        if acceptance is not None:
            job.drafting = Drafting(self._drafter.modules, acceptance)

    def _has_room_for(self, job: Job) -> bool:
        """Whether what is known of it fits beside what is known of the others; alone it always does.

        Chunks that somebody uses take no room, and those that several will read take it once.
        """
        if not self._running:
            return True
        jobs, chunks, shared = [*self._running, job], set[bytes](), 0
        for key in itertools.chain.from_iterable(each.keys_ahead() for each in jobs):
            shared += key in chunks or self._pool.in_use(key)
            chunks.add(key)
        needed = sum(each.outstanding_pages for each in jobs) - shared * (self.chunk // PAGE)
        return needed <= self._pool.available

    def _ensure(self, job: Job, tokens: int) -> bool:
        """Give a running job pages for so many tokens, at the cost of jobs that come after it if need be."""
        while (missing := pages_for(tokens) - job.page_count) > 0:
            pages = self._pool.take(missing)
            if pages is not None:
                job.take(pages)
                return True
            victim = max(self._running, key=lambda other: other.rank)
            if victim is job:
                return False
            self._preempt(victim)
        return True

    def _preempt(self, job: Job) -> None:
        """Take a job's pages. It keeps its tokens and goes on where it was, once it has read them again."""
        self._running.remove(job)
        self._release(job)
        bisect.insort(self._waiting, job, key=lambda job: job.rank)
        job.preemptions += 1
        self._counts["preemptions"] += 1

    def _release(self, job: Job) -> None:
        self._pool.give_back(job.pages)
        for chunk in reversed(job.chunks):
            self._pool.release(chunk)
        job.forget_pages()

    # reading prompts

    def _read_prompts(self) -> None:
        """Read chunks, in order of rank, until a chunk's worth of tokens has been computed."""
        begun, budget = time.perf_counter(), self.chunk
        for job in sorted(self._running, key=lambda job: job.rank):
            while budget > 0 and job in self._running and not job.prefilled:
                end = min(job.read + self.chunk, job.prompt_length)
                if self._take_shared_chunk(job, end):
                    continue
                if not self._ensure(job, end):
                    break
                budget -= end - job.read
                self._read_chunk(job, end)
        self._seconds["prefill"] += time.perf_counter() - begun

    def _take_shared_chunk(self, job: Job, end: int) -> bool:
        """Use a chunk that has been read before, if there is one and a token is left to begin the answer from."""
        if end - job.read < self.chunk or end == len(job.ids) or job.sampling.prompt_logprobs is not None:
            return False
        # Else one request without drafts would keep them from all that begin like it, for as long as they come.
        with_drafts = job.drafting is not None and not self.pace.given_up
        chunk = self._pool.find(job.chunk_key(job.read // self.chunk), with_drafts=with_drafts)
        if chunk is None:
            return False
        job.use(chunk)
        job.read = end
        if not job.preemptions:
            job.cached_tokens += self.chunk
            self._counts["cached"] += self.chunk
        if not chunk.has_drafts:
            job.drafting = None
        return True

    def _read_chunk(self, job: Job, end: int) -> None:
        transformer, start = self.model.transformer, job.read
        weight = transformer.embed.weight
        tokens_BT = torch.tensor([job.ids[start:end]], device=weight.device)
        view = PagedView(self.cache, job.table_P, start, weight.dtype)
        hidden_TD = transformer.hidden(tokens_BT, cache=view)[0][0]
        job.read = end
        if job.sampling.prompt_logprobs is not None and len(job.scores) <= start + 1:
            self._score(job, hidden_TD, start)
        if job.drafting is not None:
            job.drafting.add(start, hidden_TD)
            self._drafter.catch_up(job)
        # A chunk that ends the text is kept for this job: the first MTP module cannot read its last position yet.
        if end - start == self.chunk and end < len(job.ids):
            self._share(job, end)
        if end == len(job.ids):
            self._next_token(job, transformer.head(hidden_TD[-1]).float().cpu())

    def _share(self, job: Job, end: int) -> None:
        """Let others use the chunk that ends here; a job's own pages are always its last."""
        count = self.chunk // PAGE
        key = job.chunk_key(end // self.chunk - 1)
        first = end // PAGE - count - sum(len(chunk.pages) for chunk in job.chunks)
        pages = job.pages[first : first + count]
        chunk = self._pool.share(key, pages, has_drafts=job.drafting is not None)
        if chunk is not None:
            job.chunks.append(chunk)
            del job.pages[first : first + count]

    def _score(self, job: Job, hidden_TD: Tensor, start: int) -> None:
        """Log-probabilities of the prompt's tokens after each position of a chunk."""
        count = job.sampling.prompt_logprobs or 0
        if not job.scores:
            job.scores.append(PromptToken(job.ids[0], None))
        for at, block_TD in enumerate(hidden_TD.split(_SCORED_AT_ONCE)):
            logits_TV = self.model.transformer.head(block_TD).float().cpu()
            first = start + at * _SCORED_AT_ONCE + 1
            for logits_V, token in zip(logits_TV, job.ids[first : job.prompt_length], strict=False):
                logprobs_V = log_probabilities(logits_V)
                job.scores.append(PromptToken(token, float(logprobs_V[token]), top_of(logprobs_V, count)))

    # decoding

    def _decode(self) -> None:
        jobs = self._with_room_to_decode()
        if not jobs:
            return
        known = [job.ids[job.read : job.read + _REPLAY] for job in jobs]
        drafts = self._draft(jobs, known)
        rows = [ids + guesses for ids, guesses in zip(known, drafts, strict=True)]
        begun = time.perf_counter()
        logits_BV, hidden_BD = self._decoder(
            torch.tensor([token for row in rows for token in row], device=self.model.transformer.embed.weight.device),
            torch.tensor([job.read + i for job, row in zip(jobs, rows, strict=True) for i in range(len(row))]),
            tables([job for job, row in zip(jobs, rows, strict=True) for _ in row]),
            self.cache,
        )
        logits_BV = logits_BV.float().cpu()
        self._seconds["decode"] += time.perf_counter() - begun
        first = 0
        for job, row, guesses in zip(jobs, rows, drafts, strict=True):
            here = slice(first, first + len(row))
            self._use(job, row, len(guesses), logits_BV[here], hidden_BD[here])
            first += len(row)
        # Choosing tokens is a part of the step that a draft may save.
        self.pace.decoding.add(len(logits_BV), time.perf_counter() - begun)

    def _with_room_to_decode(self) -> list[Job]:
        """Jobs whose prompts are read and whose next rows have pages, the first in rank first."""
        jobs = []
        for job in sorted(self._running, key=lambda job: job.rank):
            ready = job in self._running and job.prefilled
            if ready and self._ensure(job, min(len(job.ids), job.read + _REPLAY)):
                jobs.append(job)
        return [job for job in jobs if job in self._running]

    def _draft(self, jobs: list[Job], known: list[list[int]]) -> list[list[int]]:
        """Guesses for each job at the tokens after those it has."""
        if not any(job.drafting for job in jobs):
            self._draft_depth = 0.0
            return [[] for _ in jobs]
        requests = [
            (job.drafting.acceptance if job.drafting else None, self._most_drafts(job, ids))
            for job, ids in zip(jobs, known, strict=True)
        ]
        depths = self.pace.depths(requests, sum(map(len, known)))
        depths = [depth and self._room_to_draft(job, depth) for job, depth in zip(jobs, depths, strict=True)]
        self._draft_depth = sum(depths) / len(depths)
        if not any(depths):
            return [[] for _ in jobs]
        for job, depth in zip(jobs, depths, strict=True):
            if depth and job.drafting and len(job.drafting.waiting[0]) > FEW:
                self._drafter.catch_up(job, but=1)  # it had not drafted for a while: no part of what a draft costs
        begun = time.perf_counter()
        drafts = self._drafter.draft(jobs, depths)
        seconds, passes = time.perf_counter() - begun, max(depths)
        self._seconds["draft"] += seconds
        self.pace.drafting.add(sum(depths) / passes, seconds / passes)
        return drafts

    def _most_drafts(self, job: Job, known: list[int]) -> int:
        """Drafts that may be of use: none while it reads again, none beyond its end.

        None either where the state before the newest token is missing, as when all before it was shared.
        """
        rereads = job.read + len(known) < len(job.ids)
        if rereads or job.drafting is None or job.read - 1 not in job.drafting.waiting[0]:
            return 0
        return max(0, min(job.limit - len(job.ids) - 1, self.pace.max_depth))

    def _room_to_draft(self, job: Job, depth: int) -> int:
        """As many of these drafts as there are pages for; chunks that nobody uses give way to a guess, but no request."""
        missing = pages_for(len(job.ids) + depth) - job.page_count
        pages = self._pool.take(missing) if missing > 0 else None
        if pages is not None:
            job.take(pages)
        return max(0, min(depth, job.page_count * PAGE - len(job.ids)))

    def _use(self, job: Job, row: list[int], drafted: int, logits_TV: Tensor, hidden_TD: Tensor) -> None:
        """Take what decoding gave for one job's rows: tokens, as long as each row's own token turns out right."""
        start, accepted = job.read, job.accepted
        job.drafted += drafted
        self._counts["drafted"] += drafted
        for index, logits_V in enumerate(logits_TV):
            job.read += 1
            if job.read < len(job.ids):
                continue  # read again after preemption; the token after it is known
            guess = row[index + 1] if index + 1 < len(row) else None
            goes_on = self._next_token(job, logits_V, guess)
            if not goes_on or job.ids[-1] != guess:
                break
        if job.drafting is None:
            return
        if drafted:
            self.pace.learn(job.drafting.acceptance, drafted, job.accepted - accepted)
        if job in self._running:
            job.drafting.add(start, hidden_TD[: job.read - start].to(self.model.transformer.embed.weight.dtype))
            if max(map(len, job.drafting.waiting)) > _MOST_UNDRAFTED:
                self._drafter.catch_up(job, but=1)

    # tokens and ends

    def _next_token(self, job: Job, logits_V: Tensor, guess: int | None = None) -> bool:
        """Choose the next token and send it out, and note whether it was guessed; returns whether it goes on."""
        try:
            chosen = job.sampler.choose(logits_V, len(job.ids))
            if chosen is not None:
                job.sampler.accept(chosen)
        except WorkFailed as error:
            return self._finish(job, "error", str(error))
        except Exception as error:  # a constraint is the caller's code: it must not take the other requests with it
            return self._finish(job, "error", f"constraint: {type(error).__name__}: {' '.join(str(error).split())}")
        if chosen is not None and chosen == guess:
            job.accepted += 1
            self._counts["accepted"] += 1
        if chosen is None or chosen in job.stop_ids:
            return self._finish(job, "stop")
        logprobs_V = log_probabilities(logits_V)
        alternatives = top_of(logprobs_V, job.sampling.top_logprobs)
        released = job.add_token(Token(chosen, "", float(logprobs_V[chosen]), alternatives))
        self._counts["generated"] += 1
        if job.text.stopped:
            return self._finish(job, "stop", released=released)
        if len(job.ids) == job.limit:
            return self._finish(job, "length", released=released)
        if released:
            job.request.deliver(released)
        return True

    def _finish(self, job: Job, reason: FinishReason, error: str | None = None, released: Sequence[Token] = ()) -> bool:
        """End a request and free what it holds; returns that it does not go on."""
        (self._running if job in self._running else self._waiting).remove(job)
        self._release(job)
        self._deliver_end(job, reason, error, released)
        return False

    def _deliver_end(self, job: Job, reason: FinishReason, error: str | None, released: Sequence[Token] = ()) -> None:
        self._finished[reason] += 1
        tokens = [*released, *job.text.finish()]
        job.request.deliver(tokens, job.outcome(reason, error))


def check_request(config: ModelConfig, ids: Sequence[int], sampling: Sampling) -> None:
    """Raises ``InputError`` if the model cannot read a prompt, or does not know a token that the settings name."""
    if not ids:
        raise InputError("prompt: must not be empty")
    if len(ids) >= config.max_position_embeddings:
        raise InputError(
            f"prompt: {len(ids)} tokens; must be fewer than max_position_embeddings={config.max_position_embeddings}"
        )
    named = {"prompt": ids, "logit_bias": sampling.logit_bias, "stop_token_ids": sampling.stop_token_ids}
    for name, tokens in named.items():
        for token in tokens:
            if not 0 <= token < config.vocab_size:
                raise InputError(f"{name}: token id {token}; must be from 0 to {config.vocab_size - 1}")


def _cache(model: LanguageModel, gib: float, dtype: torch.dtype | None, *, mtp_layers: int) -> PagedCache:
    weight = model.transformer.embed.weight
    dtype = dtype or weight.dtype
    page_bytes = PagedCache.page_bytes(model.config, mtp_layers=mtp_layers, dtype=dtype)
    pages = int(gib * 2**30 / page_bytes) if gib > 0 else 0
    if not pages:
        raise InputError(f"cache_gib={gib:g}: must hold at least one page of {page_bytes / 2**30:.3g} GiB")
    return PagedCache(model.config, pages, mtp_layers=mtp_layers, dtype=dtype, device=weight.device)
