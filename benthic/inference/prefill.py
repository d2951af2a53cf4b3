"""Reading prompts: in chunks, some in each step, and what an earlier request has read is taken over.

A prompt is read alone, in chunks that begin at fixed multiples of the chunk's length, so that what is computed for it
depends on nothing else.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benthic.inference.admission import Admission
from benthic.inference.figures import Figures
from benthic.inference.job import Job
from benthic.inference.paged_cache import PAGE, PagedCache, PagedView
from benthic.inference.request import PromptToken
from benthic.inference.results import Results
from benthic.inference.sampling import Logits, log_probabilities, top_of
from benthic.inference.speculation import Speculation
from benthic.model import Transformer
from benthic.ops.product import own_products

_SCORED_AT_ONCE = 64
"""Prompt tokens whose logits are held at a time."""


def read_chunk(transformer: Transformer, cache: PagedCache, table_P: Tensor, start: int, ids: Sequence[int]) -> Tensor:
    """Consecutive tokens of one sequence in one pass: hidden states (T, D) after the final norm.

    Args:
        transformer: the model.
        cache: has the tokens before, and receives the latents of these.
        table_P: the sequence's pages in order.
        start: tokens cached before.
        ids: the tokens.
    """
    weight = transformer.embed.weight
    view = PagedView(cache, table_P, start, weight.dtype)
    with own_products(weight, tiles=True):
        hidden_BTD, _ = transformer.hidden(torch.tensor([list(ids)], device=weight.device), cache=view)
    return hidden_BTD[0]


class Prefill:
    """Reads the prompts of the requests that run.

    Args:
        transformer: the model.
        cache: its latents.
        chunk: tokens that are read at once and shared as one.
        admission: who runs, and the pages.
        speculation: lets MTP modules read prompts too.
        results: takes the first token of each answer.
        figures: counts tokens and seconds.
    """

    def __init__(
        self, transformer: Transformer, cache: PagedCache, chunk: int, admission: Admission, speculation: Speculation,
        results: Results, figures: Figures,
    ) -> None:  # fmt: skip
        self._transformer, self._cache, self._chunk = transformer, cache, chunk
        self._admission, self._speculation, self._results, self._figures = admission, speculation, results, figures

    def step(self) -> None:
        """Read chunks, in order of rank, until a chunk's worth of tokens has been computed."""
        begun, budget = time.perf_counter(), self._chunk
        for job in self._admission.in_order():
            while budget > 0 and job in self._admission.running and not job.prefilled:
                end = min(job.read + self._chunk, job.prompt_length)
                if self._take_shared(job, end):
                    continue
                if not self._admission.ensure(job, end):
                    break
                budget -= end - job.read
                self._read(job, end)
        self._figures.prefill_s += time.perf_counter() - begun

    def _take_shared(self, job: Job, end: int) -> bool:
        """Use a chunk that has been read before, if there is one and a token is left to begin the answer from."""
        if end - job.read < self._chunk or end == len(job.ids) or job.sampling.prompt_logprobs is not None:
            return False
        with_drafts = self._speculation.wants_modules_to_read(job)
        chunk = self._admission.pool.find(job.chunk_key(job.read // self._chunk), with_drafts=with_drafts)
        if chunk is None:
            return False
        job.use(chunk)
        job.read = end
        if not job.preemptions:
            job.cached_tokens += self._chunk
            self._figures.cached_tokens += self._chunk
        if not chunk.has_drafts:
            job.drafting = None
        return True

    def _read(self, job: Job, end: int) -> None:
        start = job.read
        hidden_TD = read_chunk(self._transformer, self._cache, job.table_P, start, job.ids[start:end])
        job.read = end
        if job.sampling.prompt_logprobs is not None and len(job.scores) <= start + 1:
            self._score(job, hidden_TD, start)
        self._speculation.read(job, start, hidden_TD)
        # A chunk that ends the text is kept for this job: the first MTP module cannot read its last position yet.
        if end - start == self._chunk and end < len(job.ids):
            self._share(job, end)
        if end == len(job.ids):
            self._results.next_token(job, Logits.of(self._transformer.head(hidden_TD[-1]).float().cpu()))

    def _share(self, job: Job, end: int) -> None:
        """Let others use the chunk that ends here; a job's own pages are always its last."""
        count = self._chunk // PAGE
        key = job.chunk_key(end // self._chunk - 1)
        first = end // PAGE - count - sum(len(chunk.pages) for chunk in job.chunks)
        pages = job.pages[first : first + count]
        chunk = self._admission.pool.share(key, pages, has_drafts=job.drafting is not None)
        if chunk is not None:
            job.chunks.append(chunk)
            del job.pages[first : first + count]

    def _score(self, job: Job, hidden_TD: Tensor, start: int) -> None:
        """Log-probabilities of the prompt's tokens after each position of a chunk."""
        count = job.sampling.prompt_logprobs or 0
        if not job.scores:
            job.scores.append(PromptToken(job.ids[0], None))
        for at, block_TD in enumerate(hidden_TD.split(_SCORED_AT_ONCE)):
            logits_TV = self._transformer.head(block_TD).float().cpu()
            first = start + at * _SCORED_AT_ONCE + 1
            for logits_V, token in zip(logits_TV, job.ids[first : job.prompt_length], strict=False):
                logprobs_V = log_probabilities(logits_V)
                job.scores.append(PromptToken(token, float(logprobs_V[token]), top_of(logprobs_V, count)))
