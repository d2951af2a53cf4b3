"""Drafts from the MTP modules: a guess at the tokens after the one that is known (V3 report section 2.2).

Module k (from 1) joins what the module before it left at position i with token i + k and guesses token i + k + 1. Each
has a layer of its own in the cache and has to read every position once; a position whose token was only a draft is
read again when the token is known. Beyond the last module, that one is repeated on its own output, a position further.
Nothing here decides what a request says, only how fast: drafts are verified by decoding.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benthic.inference.decode import Decoder, read_mtp
from benthic.inference.decoded import Ahead
from benthic.inference.job import Job, Waiting
from benthic.inference.paged_cache import PagedCache, PagedView
from benthic.model import LanguageModel
from benthic.ops.product import own_products

FEW = 8
"""Rows of one request up to which they are read as decoding does; more are read in one pass."""


class Drafter:
    """The MTP modules of a model at work on the paged cache."""

    def __init__(self, model: LanguageModel, decoder: Decoder, cache: PagedCache) -> None:
        self._model, self._decoder, self._cache = model, decoder, cache
        self.modules = len(model.mtp)

    def catch_up(self, job: Job, but: int = 0) -> None:
        """Let the modules read everything whose token is known, ``but`` for the last positions, without drafting."""
        assert job.drafting is not None
        for module, waiting in enumerate(job.drafting.waiting):
            known = min(waiting.end, len(job.ids) - module - 1, job.read - but) - waiting.start
            if known > 0:
                self._hand_on(job, module, self._read_at_once(job, module, known, []))

    def ahead(self, jobs: Sequence[Job], depths: Sequence[int], known: Sequence[Sequence[int]]) -> Ahead | None:
        """The same drafts, to be made by the step that reads ``known`` and verifies them; None if it cannot.

        What waits for the module counts as read from here on.
        """
        active = [job for job, depth in zip(jobs, depths, strict=True) if depth]
        if not self._decoder.drafts or not all(job.sampler.takes_likeliest for job in active):
            return None
        hidden, tokens, last, to = [], [], [], []
        positions: list[int] = []
        row = 0
        for job, depth, ids in zip(jobs, depths, known, strict=True):
            if depth and job.drafting:
                waiting = job.drafting.waiting[0]
                count = len(waiting)
                assert waiting.end < len(job.ids), "the token after each state is known"
                hidden.append(waiting.first(count))
                tokens += job.ids[waiting.start + 1 : waiting.end + 1]
                positions += range(waiting.start, waiting.end)
                last.append(len(positions) - 1)
                to.append(row + len(ids))
                waiting.drop(count)
            row += len(ids) + depth
        return Ahead(torch.cat(hidden), tokens, positions, last, [d for d in depths if d], to)

    def draft(self, jobs: Sequence[Job], depths: Sequence[int]) -> list[list[int]]:
        """So many guesses for each job at the tokens that follow its ids; room for their latents is there."""
        drafts: list[list[int]] = [[] for _ in jobs]
        last: list[tuple[int, Tensor]] = [(0, torch.empty(0)) for _ in jobs]
        for depth in range(max(depths, default=0)):
            active = [index for index in range(len(jobs)) if depths[index] > depth]
            if depth < self.modules:
                hidden = self._next_module([(jobs[i], drafts[i]) for i in active], depth)
            else:
                hidden = self._last_module_again([(jobs[i], drafts[i], *last[i]) for i in active])
            logits_BV = self._model.transformer.head(torch.stack([state for _, state in hidden])).float().cpu()
            for index, state, logits_V in zip(active, hidden, logits_BV, strict=True):
                last[index] = state
                position = len(jobs[index].ids) + depth
                drafts[index].append(jobs[index].sampler.guess(logits_V, position))
        return drafts

    def _next_module(self, jobs: Sequence[tuple[Job, list[int]]], module: int) -> list[tuple[int, Tensor]]:
        """All that waits for a module, read; for each job the last position and its state."""
        outcome: list[tuple[int, Tensor]] = []
        few = [(job, drafts) for job, drafts in jobs if len(_waiting(job, module)) <= FEW]
        hidden_BD = self._read_rows(module, few) if few else torch.empty(0)
        start = 0
        for job, drafts in jobs:
            waiting = _waiting(job, module)
            count, last = len(waiting), waiting.end - 1
            if count <= FEW:
                out_TD = hidden_BD[start : start + count]
                start += count
            else:
                out_TD = self._read_at_once(job, module, count, drafts)
            self._hand_on(job, module, out_TD)
            outcome.append((last, out_TD[-1]))
        return outcome

    def _last_module_again(self, jobs: Sequence[tuple[Job, list[int], int, Tensor]]) -> list[tuple[int, Tensor]]:
        hidden_BD = self._read(
            self.modules - 1,
            torch.stack([state for *_, state in jobs]),
            self._tensor([drafts[-1] for _, drafts, _, _ in jobs]),
            torch.tensor([position + 1 for _, _, position, _ in jobs]),
            [job for job, *_ in jobs],
        )
        return [(position + 1, hidden_D) for (_, _, position, _), hidden_D in zip(jobs, hidden_BD, strict=True)]

    def _read_rows(self, module: int, rows: Sequence[tuple[Job, list[int]]]) -> Tensor:
        """A few positions of several jobs: hidden states (B, D)."""
        hidden, tokens, owners = [], [], []
        positions: list[int] = []
        for job, drafts in rows:
            waiting = _waiting(job, module)
            hidden.append(waiting.first(len(waiting)))
            tokens += _tokens_after(job, drafts, module, len(waiting))
            positions += range(waiting.start, waiting.end)
            owners += [job] * len(waiting)
        return self._read(module, torch.cat(hidden), self._tensor(tokens), torch.tensor(positions), owners)

    def _read(
        self, module: int, hidden_BD: Tensor, tokens_B: Tensor, positions_B: Tensor, owners: Sequence[Job]
    ) -> Tensor:
        out_BD = self._decoder.draft(module, hidden_BD, tokens_B, positions_B, tables(owners), self._cache)
        return out_BD.to(hidden_BD.dtype)

    def _read_at_once(self, job: Job, module: int, count: int, drafts: list[int]) -> Tensor:
        """The first positions that wait of one job: hidden states (T, D)."""
        waiting = _waiting(job, module)
        hidden_TD = waiting.first(count)
        tokens_T = self._tensor(_tokens_after(job, drafts, module, count))
        view = PagedView(self._cache, job.table_P, waiting.start, hidden_TD.dtype)
        with own_products(hidden_TD, tiles=True):
            return read_mtp(self._model, module, hidden_TD, tokens_T, view)

    def _hand_on(self, job: Job, module: int, out_TD: Tensor) -> None:
        """Pass what a module gave to the next, and keep to be read again what stood before a mere draft."""
        waiting = _waiting(job, module)
        if module + 1 < self.modules:
            _waiting(job, module + 1).put(waiting.start, out_TD)
        waiting.drop(max(0, min(len(out_TD), len(job.ids) - module - 1 - waiting.start)))

    def _tensor(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens, device=self._model.transformer.embed.weight.device)


def tables(jobs: Sequence[Job]) -> Tensor:
    """Page tables (B, P) of jobs, one row each, as wide as the longest."""
    width = max(job.page_count for job in jobs)
    table_BP = np.empty((len(jobs), width), np.int32)
    for row_P, job in zip(table_BP, jobs, strict=True):
        row_P[: job.page_count] = job.table[: job.page_count]
        row_P[job.page_count :] = -1
    return torch.from_numpy(table_BP)


def _waiting(job: Job, module: int) -> Waiting:
    """What a module has to read of a job that drafts."""
    assert job.drafting is not None
    return job.drafting.waiting[module]


def _tokens_after(job: Job, drafts: list[int], module: int, count: int) -> list[int]:
    """The tokens that a module joins to the first positions that wait for it."""
    first = _waiting(job, module).start + module + 1
    ids, beyond = job.ids[first : first + count], max(0, first - len(job.ids))
    return [*ids, *drafts[beyond : beyond + count - len(ids)]]
