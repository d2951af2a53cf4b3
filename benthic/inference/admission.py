"""Which requests run, which wait, and who has to give up pages when there are too few."""

import bisect
import itertools

from benthic.inference.figures import Figures
from benthic.inference.job import Job
from benthic.inference.paged_cache import PAGE, pages_for
from benthic.inference.pages import PagePool


class Admission:
    """The requests of an engine, and the pages that those at work hold.

    Args:
        pages: of the cache.
        max_batch: requests that run at once.
        chunk: tokens of a prompt that are read and shared as one.
        figures: counts preemptions.
    """

    def __init__(self, pages: int, max_batch: int, chunk: int, figures: Figures) -> None:
        self.pool = PagePool(pages)
        self.running: list[Job] = []
        self.waiting: list[Job] = []
        """In order of rank."""
        self._max_batch, self._chunk_pages, self._figures = max_batch, chunk // PAGE, figures

    def queue(self, job: Job) -> None:
        """It waits for its turn."""
        bisect.insort(self.waiting, job, key=_rank)

    def admit(self) -> list[Job]:
        """Let waiting requests run, in order; a more urgent one takes a less urgent one's place. Returns the new."""
        admitted: list[Job] = []
        while self.waiting:
            job = self.waiting[0]
            if len(self.running) < self._max_batch and self._has_room_for(job):
                self.running.append(self.waiting.pop(0))
                admitted.append(job)
                continue
            victim = max(self.running, key=_rank)
            if victim.priority >= job.priority:
                break
            self._preempt(victim)
        return admitted

    def in_order(self) -> list[Job]:
        """Those that run now, the first in rank first."""
        return sorted(self.running, key=_rank)

    def ensure(self, job: Job, tokens: int) -> bool:
        """Give a running job pages for so many tokens, at the cost of jobs that come after it if need be."""
        while not self.spare(job, tokens):
            victim = max(self.running, key=_rank)
            if victim is job:
                return False
            self._preempt(victim)
        return True

    def spare(self, job: Job, tokens: int) -> bool:
        """The same, if no other job has to give way; returns whether there were enough."""
        missing = pages_for(tokens) - job.page_count
        if missing > 0:
            pages = self.pool.take(missing)
            if pages is None:
                return False
            job.take(pages)
        return True

    def remove(self, job: Job) -> None:
        """It has ended, running or waiting, and holds nothing any more."""
        (self.running if job in self.running else self.waiting).remove(job)
        self._release(job)

    def remove_all(self) -> list[Job]:
        """All have ended, and the cache is empty; returns them."""
        jobs = [*self.running, *self.waiting]
        self.running, self.waiting = [], []
        evictions = self.pool.evictions
        self.pool = PagePool(self.pool.total)
        self.pool.evictions = evictions
        return jobs

    def _has_room_for(self, job: Job) -> bool:
        """Whether what is known of it fits beside what is known of the others; alone it always does.

        Chunks that somebody uses take no room, and those that several will read take it once.
        """
        if not self.running:
            return True
        jobs, chunks, shared = [*self.running, job], set[bytes](), 0
        for key in itertools.chain.from_iterable(each.keys_ahead() for each in jobs):
            shared += key in chunks or self.pool.in_use(key)
            chunks.add(key)
        needed = sum(each.outstanding_pages for each in jobs) - shared * self._chunk_pages
        return needed <= self.pool.available

    def _preempt(self, job: Job) -> None:
        """Take a job's pages. It keeps its tokens and goes on where it was, once it has read them again."""
        self.running.remove(job)
        self._release(job)
        self.queue(job)
        job.preemptions += 1
        self._figures.preemptions += 1

    def _release(self, job: Job) -> None:
        self.pool.give_back(job.pages)
        for chunk in reversed(job.chunks):
            self.pool.release(chunk)
        job.forget_pages()


def _rank(job: Job) -> tuple[int, int]:
    return job.rank
