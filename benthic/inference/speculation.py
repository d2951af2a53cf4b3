"""Which requests draft, how far, and what is learned from it; the drafts themselves are the drafter's."""

import time
from collections.abc import Sequence

from torch import Tensor

from benthic.inference.admission import Admission
from benthic.inference.decoded import Ahead
from benthic.inference.drafter import FEW, Drafter
from benthic.inference.figures import Figures
from benthic.inference.job import Drafting, Job
from benthic.inference.pace import Pace
from benthic.inference.paged_cache import PAGE

_MOST_UNDRAFTED = 128
"""Positions that MTP modules may lag behind while nothing is drafted."""


class Speculation:
    """Drafts for the requests of a step."""

    def __init__(self, drafter: Drafter, pace: Pace, admission: Admission, figures: Figures) -> None:
        self.drafter, self.pace = drafter, pace
        self._admission, self._figures = admission, figures

    def begin(self, job: Job) -> None:
        """Decide whether a new request drafts at all."""
        acceptance = self.pace.new_request()
        if acceptance is not None:
            job.drafting = Drafting(self.drafter.modules, acceptance)

    def wants_modules_to_read(self, job: Job) -> bool:
        """Whether it had better read a chunk again than take one that no MTP module has read.

        Else one request without drafts would keep them from all that begin like it, for as long as they come.
        """
        return job.drafting is not None and not self.pace.given_up

    def read(self, job: Job, start: int, hidden_TD: Tensor) -> None:
        """A part of the prompt has been read, from position ``start`` on."""
        if job.drafting is not None:
            job.drafting.waiting[0].put(start, hidden_TD)
            self.drafter.catch_up(job)

    def draft(self, jobs: Sequence[Job], known: Sequence[Sequence[int]]) -> tuple[list[list[int]], Ahead | None]:
        """Guesses for each job at the tokens after those it has; ``known`` it reads in this step anyway.

        Where the step can make them itself, there are zeros in their place and what it has to be told.
        """
        depths = self._depths(jobs, known)
        self._figures.draft_depth = sum(depths) / len(depths)
        if not any(depths):
            return [[] for _ in jobs], None
        for job, depth in zip(jobs, depths, strict=True):
            if depth and job.drafting and len(job.drafting.waiting[0]) > FEW:
                self.drafter.catch_up(job, but=1)  # it had not drafted for a while: no part of what a draft costs
        ahead = self.drafter.ahead(jobs, depths, known)
        if ahead:
            return [[0] * depth for depth in depths], ahead
        begun = time.perf_counter()
        drafts = self.drafter.draft(jobs, depths)
        self.took(time.perf_counter() - begun, depths)
        return drafts, None

    def took(self, seconds: float, depths: Sequence[int]) -> None:
        """Drafts of so many tokens for each job have been made."""
        passes = max(depths)
        self._figures.draft_s += seconds
        self.pace.drafting.add(sum(depths) / passes, seconds / passes)

    def learn(self, job: Job, start: int, hidden_TD: Tensor, drafted: int, accepted: int, *, goes_on: bool) -> None:
        """What a step gave for a job that drafts: hidden states (T, D) of the tokens from ``start`` on that it has."""
        assert job.drafting is not None
        if drafted:
            self.pace.learn(job.drafting.acceptance, drafted, accepted)
        if goes_on:
            job.drafting.waiting[0].put(start, hidden_TD)
            if max(map(len, job.drafting.waiting)) > _MOST_UNDRAFTED:
                self.drafter.catch_up(job, but=1)

    def _depths(self, jobs: Sequence[Job], known: Sequence[Sequence[int]]) -> list[int]:
        """How many drafts each job gets."""
        if not any(job.drafting for job in jobs):
            return [0 for _ in jobs]
        requests = [(job.drafting.acceptance if job.drafting else None, self._most_drafts(job)) for job in jobs]
        depths = self.pace.depths(requests, sum(map(len, known)))
        return [depth and self._room_to_draft(job, depth) for job, depth in zip(jobs, depths, strict=True)]

    def _most_drafts(self, job: Job) -> int:
        """Drafts that may be of use: none while it reads again, none beyond its end.

        None either where the state before the newest token is missing, as when all before it was shared.
        """
        rereads = job.read + 1 < len(job.ids)
        if rereads or job.drafting is None or job.read - 1 not in job.drafting.waiting[0]:
            return 0
        return max(0, min(job.limit - len(job.ids) - 1, self.pace.max_depth))

    def _room_to_draft(self, job: Job, depth: int) -> int:
        """As many of these drafts as there are pages for; chunks that nobody uses give way to a guess, but no job."""
        self._admission.spare(job, len(job.ids) + depth)
        return max(0, min(depth, job.page_count * PAGE - len(job.ids)))
