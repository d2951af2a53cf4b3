"""Writing answers: one decode step for all requests whose prompts are read, with drafts as further rows.

Rows of a step do not see each other. A request that had to give up its pages reads its own tokens again here, as they
were decoded the first time, several a step.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benthic.inference.admission import Admission
from benthic.inference.decode import Decoder
from benthic.inference.decoded import Ahead, Decoded
from benthic.inference.drafter import tables
from benthic.inference.figures import Figures
from benthic.inference.job import Job
from benthic.inference.paged_cache import PagedCache
from benthic.inference.results import Results
from benthic.inference.speculation import Speculation

_REPLAY = 16
"""Tokens of its own that a preempted request decodes again in one step."""


class Stepping:
    """Decodes for the requests that run.

    Args:
        decoder: of the model.
        cache: its latents.
        like: a weight of the model, whose device and dtype what it computes has.
        admission: who runs, and the pages.
        speculation: the drafts.
        results: takes the tokens.
        figures: counts tokens and seconds.
    """

    def __init__(
        self, decoder: Decoder, cache: PagedCache, like: Tensor, admission: Admission, speculation: Speculation,
        results: Results, figures: Figures,
    ) -> None:  # fmt: skip
        self._decoder, self._cache, self._like = decoder, cache, like
        self._admission, self._speculation, self._results, self._figures = admission, speculation, results, figures

    def step(self) -> None:
        """A token or more for each request whose prompt is read."""
        jobs = self._with_room()
        if not jobs:
            return
        known = [job.ids[job.read : job.read + _REPLAY] for job in jobs]
        drafts, ahead = self._speculation.draft(jobs, known)
        rows = [[*ids, *guesses] for ids, guesses in zip(known, drafts, strict=True)]
        begun = time.perf_counter()
        decoded = self._decode(jobs, rows, ahead)
        self._figures.decode_s += time.perf_counter() - begun - decoded.draft_s
        if ahead:
            self._speculation.took(decoded.draft_s, [len(guesses) for guesses in drafts])
        first = 0
        for job, row, guesses in zip(jobs, rows, drafts, strict=True):
            self._use(job, slice(first, first + len(row)), len(guesses), decoded)
            first += len(row)
        # Choosing tokens is a part of the step that a draft may save.
        self._speculation.pace.decoding.add(first, time.perf_counter() - begun - decoded.draft_s)

    def _with_room(self) -> list[Job]:
        """Jobs whose prompts are read and whose next rows have pages, the first in rank first."""
        jobs = []
        for job in self._admission.in_order():
            ready = job in self._admission.running and job.prefilled
            if ready and self._admission.ensure(job, min(len(job.ids), job.read + _REPLAY)):
                jobs.append(job)
        return [job for job in jobs if job in self._admission.running]

    def _decode(self, jobs: Sequence[Job], rows: Sequence[list[int]], ahead: Ahead | None) -> Decoded:
        """All rows of all jobs, in order."""
        tokens = [token for row in rows for token in row]
        positions = [job.read + i for job, row in zip(jobs, rows, strict=True) for i in range(len(row))]
        return self._decoder.step(
            torch.from_numpy(np.array(tokens)).to(self._like.device),  # in less than half of torch.tensor's time
            torch.from_numpy(np.array(positions)),
            tables([job for job, row in zip(jobs, rows, strict=True) for _ in row]),
            self._cache,
            ahead,
        )

    def _use(self, job: Job, here: slice, drafted: int, decoded: Decoded) -> None:
        """Take what decoding gave for one job's rows: tokens, as long as each row's own token turns out right."""
        start, accepted, goes_on = job.read, job.accepted, True
        job.drafted += drafted
        self._figures.drafted_tokens += drafted
        row = decoded.tokens_B[here]
        for index, logits in enumerate(decoded.logits_B[here]):
            job.read += 1
            if job.read < len(job.ids):
                continue  # read again after preemption; the token after it is known
            guess = row[index + 1] if index + 1 < len(row) else None
            goes_on = self._results.next_token(job, logits, guess)
            if not goes_on or job.ids[-1] != guess:
                break
        if job.drafting is not None:
            used_TD = decoded.hidden_BD[here.start : here.start + job.read - start].to(self._like.dtype)
            self._speculation.learn(job, start, used_TD, drafted, job.accepted - accepted, goes_on=goes_on)
