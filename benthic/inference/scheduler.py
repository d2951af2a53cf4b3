"""The heart of the engine: what happens in each step, and in which order.

A step admits requests (``admission``), reads at most a chunk's worth of prompts (``prefill``) and then decodes one row,
or several with drafts (``speculation``), for each request whose prompt is read (``stepping``); tokens go out through
``results``. What a request computes never depends on the others:

- a prompt is read alone, in chunks that begin at fixed multiples of the chunk's length;
- tokens after it are decoded row by row, and rows do not see each other;
- only chunks of prompts are shared, which whoever reads them computes alike;
- a request that had to give up its pages reads its prompt in the same chunks again, and its own tokens by decoding.

So tokens and log-probabilities are the same, to the last bit, in any company.
"""

import itertools
import threading
import time
from collections.abc import Sequence

import torch

from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.inference.admission import Admission
from benthic.inference.decode import decoder
from benthic.inference.drafter import Drafter
from benthic.inference.figures import Figures
from benthic.inference.job import Job
from benthic.inference.limits import check_options, chunk_length, text_limit
from benthic.inference.pace import Pace
from benthic.inference.paged_cache import PagedCache
from benthic.inference.prefill import Prefill
from benthic.inference.request import EngineStats, FinishReason, Request, Sampling
from benthic.inference.results import Results
from benthic.inference.speculation import Speculation
from benthic.inference.stepping import Stepping
from benthic.model import LanguageModel
from benthic.ops.product import said_of_kernels
from benthic.precision.latents import CACHE_DTYPES, CachePrecision
from benthic.precision.quantise import Precision


class Scheduler:
    """Runs requests on one model, a step at a time, in whichever single thread calls :meth:`step`.

    Args:
        model: stays on its device and in its precision.
        tokenizer: the one the model was trained with.
        cache_gib: memory of the latent cache, in GiB.
        max_batch: requests that run at once.
        max_draft: tokens the MTP modules may draft ahead; 0 switches them off.
        precision: that weights are kept in for decoding, by default their own; the model's are rounded to it.
        cache_precision: that latents are cached in, fp32, bf16 or fp8; by default the type of the weights.

    Raises:
        InputError: a limit or the precision is wrong, or the memory holds not even one page.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, *, cache_gib: float = 1.0, max_batch: int = 16,
        max_draft: int = 3, precision: Precision | None = None, cache_precision: CachePrecision | None = None,
    ) -> None:  # fmt: skip
        check_options(max_batch, max_draft, precision, cache_precision)
        self.model, self.config, self.tokenizer = model.eval(), model.config, tokenizer
        self.max_batch, self.chunk = max_batch, chunk_length(model.config)
        self.cache = _cache(model, cache_gib, cache_precision, mtp_layers=len(model.mtp) if max_draft else 0)
        self._decoder = decoder(model, precision)
        self._figures = figures = Figures()
        self._admission = admission = Admission(self.cache.pages, max_batch, self.chunk, figures)
        self._results = results = Results(admission, figures)
        pace, drafter = Pace(max_draft if len(model.mtp) else 0), Drafter(model, self._decoder, self.cache)
        self.speculation = speculation = Speculation(drafter, pace, admission, figures)
        transformer, cache, weight = model.transformer, self.cache, model.transformer.embed.weight
        self._prefill = Prefill(transformer, cache, self.chunk, admission, speculation, results, figures)
        self._stepping = Stepping(self._decoder, cache, weight, admission, speculation, results, figures)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._inbox: list[Job] = []

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
        return text_limit(self.config, ids, sampling, self.cache.pages)

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._inbox or self._admission.waiting or self._admission.running)

    @property
    def waiting(self) -> int:
        """Requests that do not run yet, or not at the moment."""
        return len(self._inbox) + len(self._admission.waiting)

    def stats(self, max_queue: int = 0) -> EngineStats:
        """Figures of this moment."""
        pool, counted = self._admission.pool, vars(self._figures)
        return EngineStats(
            running=len(self._admission.running), waiting=self.waiting, max_batch=self.max_batch, max_queue=max_queue,
            pages_total=pool.total, pages_used=pool.used, pages_cached=pool.cached, page_bytes=self.cache.bytes_a_page,
            evictions=pool.evictions, decoder=self._decoder.name,
            reader=said_of_kernels(self.model.transformer.embed.weight, tiles=True),
            **counted | {"finished": dict(self._figures.finished)},
        )  # fmt: skip

    # ------------------------------------------------------------------ from the thread that steps

    @torch.inference_mode()
    def step(self) -> None:
        """Admit, read some of the prompts, decode a token or more for each of the rest."""
        with self._lock:
            arrived, self._inbox = self._inbox, []
            for job in arrived:
                self._admission.queue(job)
        self._end_cancelled_and_late()
        for job in self._admission.admit():
            self._begin(job)
        self._figures.steps += 1
        self._prefill.step()
        self._stepping.step()

    def end_all(self, reason: FinishReason, error: str | None = None) -> None:
        """End every request, whatever it was doing, and begin with an empty cache."""
        with self._lock:
            jobs = [*self._admission.remove_all(), *self._inbox]
            self._inbox = []
        for job in jobs:
            self._results.tell_end(job, reason, error)

    def _end_cancelled_and_late(self) -> None:
        now = time.monotonic()
        for job in [*self._admission.waiting, *self._admission.running]:
            if job.request.cancelled:
                self._results.finish(job, "cancelled")
            elif job.deadline is not None and now >= job.deadline:
                self._results.finish(job, "deadline")

    def _begin(self, job: Job) -> None:
        job.start()
        if not job.preemptions:
            self._figures.prompt_tokens += job.prompt_length
            self.speculation.begin(job)


def _cache(model: LanguageModel, gib: float, precision: CachePrecision | None, *, mtp_layers: int) -> PagedCache:
    weight = model.transformer.embed.weight
    dtype = CACHE_DTYPES[precision] if precision else weight.dtype
    page_bytes = PagedCache.page_bytes(model.config, mtp_layers=mtp_layers, dtype=dtype)
    pages = int(gib * 2**30 / page_bytes) if gib > 0 else 0
    if not pages:
        raise InputError(f"cache_gib={gib:g}: must hold at least one page of {page_bytes / 2**30:.3g} GiB")
    return PagedCache(model.config, pages, mtp_layers=mtp_layers, dtype=dtype, device=weight.device)
