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
from benthic.inference.job import Job
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
            known = sorted(i for i in waiting if i + module + 1 < len(job.ids) and i < job.read - but)
            if known:
                self._hand_on(job, module, known, self._read_at_once(job, module, known, []))

    def ahead(self, jobs: Sequence[Job], depths: Sequence[int], known: Sequence[Sequence[int]]) -> Ahead | None:
        """The same drafts, to be made by the step that reads ``known`` and verifies them; None if it cannot.

        What waits for the module counts as read from here on.
        """
        active = [job for job, depth in zip(jobs, depths, strict=True) if depth]
        if not self._decoder.drafts or not all(job.sampler.takes_likeliest for job in active):
            return None
        hidden, tokens, positions, owners, last, to = [], [], [], [], [], []
        row = 0
        for job, depth, ids in zip(jobs, depths, known, strict=True):
            if depth and job.drafting:
                waiting = job.drafting.waiting[0]
                where = sorted(waiting)
                hidden += [waiting[position] for position in where]
                tokens += [job.ids[position + 1] for position in where]
                positions += where
                owners += [job] * len(where)
                last.append(len(positions) - 1)
                to.append(row + len(ids))
                waiting.clear()
            row += len(ids) + depth
        width = max(job.page_count for job in jobs)
        return Ahead(torch.stack(hidden), tokens, positions, tables(owners, width), last, [d for d in depths if d], to)

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
        few = []
        for job, drafts in jobs:
            assert job.drafting is not None
            positions = sorted(job.drafting.waiting[module])
            few.append((job, drafts, positions))
        rows = [row for row in few if len(row[2]) <= FEW]
        hidden_BD = self._read_rows(module, rows) if rows else torch.empty(0)
        start = 0
        for job, drafts, positions in few:
            if len(positions) <= FEW:
                out_TD = hidden_BD[start : start + len(positions)]
                start += len(positions)
            else:
                out_TD = self._read_at_once(job, module, positions, drafts)
            self._hand_on(job, module, positions, out_TD)
            outcome.append((positions[-1], out_TD[-1]))
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

    def _read_rows(self, module: int, rows: Sequence[tuple[Job, list[int], list[int]]]) -> Tensor:
        """A few positions of several jobs: hidden states (B, D)."""
        hidden, tokens, positions, owners = [], [], [], []
        for job, drafts, where in rows:
            assert job.drafting is not None
            hidden += [job.drafting.waiting[module][i] for i in where]
            tokens += _tokens_after(job, drafts, module, where)
            positions += where
            owners += [job] * len(where)
        return self._read(module, torch.stack(hidden), self._tensor(tokens), torch.tensor(positions), owners)

    def _read(
        self, module: int, hidden_BD: Tensor, tokens_B: Tensor, positions_B: Tensor, owners: Sequence[Job]
    ) -> Tensor:
        out_BD = self._decoder.draft(module, hidden_BD, tokens_B, positions_B, tables(owners), self._cache)
        return out_BD.to(hidden_BD.dtype)

    def _read_at_once(self, job: Job, module: int, positions: list[int], drafts: list[int]) -> Tensor:
        """Many consecutive positions of one job: hidden states (T, D)."""
        assert job.drafting is not None
        hidden_TD = torch.stack([job.drafting.waiting[module][i] for i in positions])
        tokens_T = self._tensor(_tokens_after(job, drafts, module, positions))
        view = PagedView(self._cache, job.table_P, positions[0], hidden_TD.dtype)
        with own_products(hidden_TD, tiles=True):
            return read_mtp(self._model, module, hidden_TD, tokens_T, view)

    def _hand_on(self, job: Job, module: int, positions: list[int], out_TD: Tensor) -> None:
        """Pass what a module gave to the next, and keep to be read again what stood before a mere draft."""
        assert job.drafting is not None
        waiting = job.drafting.waiting
        if module + 1 < self.modules:
            waiting[module + 1].update(zip(positions, out_TD, strict=True))
        for position in positions:
            if position + module + 1 < len(job.ids):
                del waiting[module][position]

    def _tensor(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens, device=self._model.transformer.embed.weight.device)


def tables(jobs: Sequence[Job], width: int = 0) -> Tensor:
    """Page tables (B, P) of jobs, one row each, as wide as the longest or as ``width``."""
    width = max(width, *(job.page_count for job in jobs))
    table_BP = np.full((len(jobs), width), -1, np.int32)
    for row_P, job in zip(table_BP, jobs, strict=True):
        row_P[: job.page_count] = job.table[: job.page_count]
    return torch.from_numpy(table_BP)


def _tokens_after(job: Job, drafts: list[int], module: int, positions: list[int]) -> list[int]:
    ids = job.ids
    return [(ids[at] if at < len(ids) else drafts[at - len(ids)]) for at in (i + module + 1 for i in positions)]
