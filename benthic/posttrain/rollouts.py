"""Answers sampled from the weights that are being trained, many at once, with Benthic's own decoding.

The sampler and the trainer must mean the same by a probability: an answer's tokens come with their log-probabilities,
which :mod:`benthic.posttrain.policy` computes again with a gradient, and with the experts that every token visited, so
that training goes through the same ones. A token is drawn with noise that depends on
nothing but the seed of its answer and its place, so that a resumed run samples the same answers.

Legend: B answers being written, N answers, P prompts, R tokens read at once, T positions, V vocabulary, L pages of a
sequence, X blocks of C tokens of the vocabulary, M layers with experts, K experts of a token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benthic.inference.decode import ReferenceDecoder
from benthic.inference.native_decode import CannotDecodeNatively, NativeDecoder
from benthic.inference.paged_cache import PAGE, PagedCache
from benthic.model import LanguageModel

_Decode = NativeDecoder | ReferenceDecoder
_ROWS = 256
"""Tokens of prompts that are read at once."""
_BLOCK = 64
"""Tokens whose probabilities are summed up before the one that was drawn is looked for among them."""
_M1, _M2, _GOLDEN = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64, 0x9E3779B97F4A7C15 - 2**64


class Answers(NamedTuple):
    """Sampled answers with their prompts, padded on the right."""

    tokens_NT: Tensor
    """int64: a prompt, its answer, and whatever fills the row up."""
    prompt_N: Tensor
    """Tokens of each prompt."""
    end_N: Tensor
    """Where each answer ends: ``tokens[prompt:end]`` has been sampled, the token that ended it included."""
    finished_N: Tensor
    """Whether the model ended the answer, rather than the limit of its length."""
    logprob_NT: Tensor
    """fp32: log-probability of each sampled token, in its place; 0 elsewhere."""
    entropy_NT: Tensor
    """fp32, nats: of the distribution that each was drawn from; 0 elsewhere."""
    experts_NTMK: Tensor
    """int32: the experts that each token visited in the layers that have any; 0 for those that were not read."""

    @property
    def sampled_NT(self) -> Tensor:  # noqa: N802 - a shape suffix
        """Which tokens have been sampled."""
        place_T = torch.arange(self.tokens_NT.shape[1])
        return (place_T >= self.prompt_N[:, None]) & (place_T < self.end_N[:, None])

    def answer_ids(self, number: int) -> list[int]:
        """What an answer says: without the token that ended it."""
        end = int(self.end_N[number]) - int(self.finished_N[number])
        ids: list[int] = self.tokens_NT[number, int(self.prompt_N[number]) : end].tolist()
        return ids


class Sampler:
    """Samples from one model, whose weights may change between calls.

    Args:
        model: the transformer alone is read; on the CPU, in fp32, where decoding is native.
        stop_ids: tokens that end an answer.
        at_once: answers that are written at the same time.
    """

    def __init__(self, model: LanguageModel, stop_ids: Sequence[int], *, at_once: int = 128) -> None:
        self._model, self._at_once = model, at_once
        self._stop_ids = torch.tensor(sorted(stop_ids))
        self._cache: PagedCache | None = None

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, copies: int = 1, max_new_tokens: int,
        temperature: float = 1.0,
    ) -> Answers:  # fmt: skip
        """``copies`` answers to each prompt, one after another.

        Args:
            prompts: token ids, at least one each.
            seeds: of each answer: one a prompt and copy.
            copies: answers to a prompt, which is read once for all of them.
            max_new_tokens: of an answer; fewer where the model's context ends.
            temperature: that logits are divided by; 0 takes the likeliest token. Log-probabilities are those of the
                distribution at this temperature (at 0, of that at 1).
        """
        assert len(seeds) == len(prompts) * copies
        decode = _decoder(self._model)  # anew: it keeps copies of some weights
        config, step = self._model.config, max(1, self._at_once // copies)
        experts = config.num_hidden_layers - config.first_k_dense_replace, config.num_experts_per_tok
        longest = min(max(map(len, prompts)) + max_new_tokens, config.max_position_embeddings)
        parts = []
        for first in range(0, len(prompts), step):
            part = prompts[first : first + step]
            seeds_of_part = seeds[first * copies : (first + step) * copies]
            writing = _Writing(part, seeds_of_part, copies, longest, max_new_tokens, experts)
            writing.run(decode, self._cache_for(len(part) * copies, longest), temperature, self._stop_ids)
            parts.append(writing.answers)
        return Answers(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _cache_for(self, answers: int, longest: int) -> PagedCache:
        pages = answers * _pages(longest)
        if self._cache is None or self._cache.pages < pages:
            weight = self._model.transformer.embed.weight
            self._cache = PagedCache(self._model.config, pages, dtype=weight.dtype, device=weight.device)
        return self._cache


def _decoder(model: LanguageModel) -> _Decode:
    try:
        return NativeDecoder(model)
    except CannotDecodeNatively as error:
        return ReferenceDecoder(model, str(error))


class _Writing:
    """Some answers while they are written."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], copies: int, longest: int, max_new_tokens: int,
        experts: tuple[int, int],
    ) -> None:  # fmt: skip
        self._prompts, self._copies = prompts, copies
        count = len(prompts) * copies
        self._table_BL = torch.arange(count * _pages(longest), dtype=torch.int32).view(count, -1)
        self._seed_B = torch.tensor(seeds, dtype=torch.int64)
        tokens_BT = torch.zeros(count, longest, dtype=torch.int64)
        for number, ids in enumerate(prompts):
            tokens_BT[number * copies : (number + 1) * copies, : len(ids)] = torch.tensor(ids)
        prompt_B = torch.tensor([len(ids) for ids in prompts]).repeat_interleave(copies)
        self._limit_B = (prompt_B + max_new_tokens).clamp_max(longest)
        self.answers = Answers(
            tokens_BT, prompt_B, prompt_B.clone(), torch.zeros(count, dtype=torch.bool), torch.zeros(count, longest),
            torch.zeros(count, longest), torch.zeros(count, longest, *experts, dtype=torch.int32),
        )  # fmt: skip

    def run(self, decode: _Decode, cache: PagedCache, temperature: float, stop_ids: Tensor) -> None:
        """Write until every answer has ended."""
        tokens_BT, _, end_B, finished_B, logprob_BT, entropy_BT, _ = self.answers
        logits_BV = self._read_prompts(decode, cache)
        active_B = (end_B < self._limit_B).nonzero()[:, 0]
        logits_BV = logits_BV[active_B]
        while len(active_B):
            place_B = end_B[active_B]
            uniform_B = uniform(self._seed_B[active_B], place_B)
            token_B, logprob_B, entropy_B = draw(logits_BV, uniform_B, temperature)
            tokens_BT[active_B, place_B], logprob_BT[active_B, place_B] = token_B, logprob_B
            entropy_BT[active_B, place_B] = entropy_B
            end_B[active_B] += 1
            finished_B[active_B] = torch.isin(token_B, stop_ids)
            going_B = ~finished_B[active_B] & (end_B[active_B] < self._limit_B[active_B])
            active_B = active_B[going_B]
            if len(active_B):
                logits_BV = self._decode(decode, active_B, place_B[going_B], cache)

    def _read_prompts(self, decode: _Decode, cache: PagedCache) -> Tensor:
        """Fill the cache with each prompt, and with as many copies of it; logits (B, V) of what follows."""
        first_P = torch.arange(len(self._prompts)) * self._copies
        length_P = self.answers.prompt_N[first_P]
        row_R = first_P.repeat_interleave(length_P)
        place_R = torch.cat([torch.arange(int(length)) for length in length_P])
        last_R = length_P.cumsum(0) - 1
        logits = []
        for start in range(0, len(row_R), _ROWS):
            row, place = row_R[start : start + _ROWS], place_R[start : start + _ROWS]
            here = last_R[(last_R >= start) & (last_R < start + _ROWS)] - start
            logits.append(self._decode(decode, row, place, cache, here))
        self._copy_prompts(cache, first_P, int(length_P.max()))
        return torch.cat(logits).repeat_interleave(self._copies, 0)

    def _decode(
        self, decode: _Decode, row_R: Tensor, place_R: Tensor, cache: PagedCache, wanted_W: Tensor | None = None
    ) -> Tensor:
        """Read the tokens in these places; logits (R, V) of what follows each, or of some of them."""
        experts_RMK = torch.zeros(len(row_R), *self.answers.experts_NTMK.shape[2:], dtype=torch.int32)
        recorded = experts_RMK if experts_RMK.numel() else None
        tokens_R = self.answers.tokens_NT[row_R, place_R]
        logits_RV, _ = decode(tokens_R, place_R, self._table_BL[row_R], cache, recorded, wanted_W)
        self.answers.experts_NTMK[row_R, place_R] = experts_RMK
        return logits_RV

    def _copy_prompts(self, cache: PagedCache, first_P: Tensor, longest: int) -> None:
        """To the other answers, what has been read for the first of each prompt's."""
        if self._copies == 1:
            return
        experts_NTMK = self.answers.experts_NTMK
        experts_NTMK[:, :longest] = experts_NTMK[first_P, :longest].repeat_interleave(self._copies, 0)
        pages_PCL = self._table_BL[:, : _pages(longest)].unflatten(0, (-1, self._copies)).long()
        source, target = pages_PCL[:, :1].expand_as(pages_PCL[:, 1:]).flatten(), pages_PCL[:, 1:].flatten()
        for pages in cache.pages_N:
            pages[target] = pages[source]


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """A token of each row, by inversion of its distribution: tokens, log-probabilities and entropies (B,).

    Args:
        logits_BV: of the next token.
        uniform_B: float64 in [0, 1).
        temperature: 0 takes the likeliest.
    """
    # Measured from the highest: so sums are rounded at the size of what is left, not of the logits.
    scaled_BV = logits_BV.float() - logits_BV.amax(-1, keepdim=True).float()
    if temperature not in (0, 1):
        scaled_BV /= temperature
    weight_BV = scaled_BV.exp()
    total_B = weight_BV.sum(-1)
    entropy_B = total_B.log() - torch.linalg.vecdot(weight_BV, scaled_BV) / total_B
    token_B = logits_BV.argmax(-1) if temperature == 0 else _invert(weight_BV, uniform_B)
    return token_B, scaled_BV.gather(-1, token_B[:, None])[:, 0] - total_B.log(), entropy_B


def _invert(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the sum of the weights before it and its own exceeds this share of their total."""
    blocks_BX = torch.nn.functional.pad(weight_BV, (0, -weight_BV.shape[1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    sums_BX = blocks_BX.sum(-1, dtype=torch.float64)
    until_BX = sums_BX.cumsum(-1)
    sought_B1 = (uniform_B * until_BX[:, -1])[:, None]
    block_B1 = _first_above(until_BX, sought_B1)
    before_B1 = until_BX.gather(-1, block_B1) - sums_BX.gather(-1, block_B1)
    inside_BC = blocks_BX.gather(1, block_B1[..., None].expand(-1, -1, _BLOCK))[:, 0].double()
    place_B1 = _first_above(inside_BC.cumsum(-1), sought_B1 - before_B1)
    # Rounding may lead past a block's last token that has any weight; the likeliest of the block is as good.
    place_B1 = place_B1.where(inside_BC.gather(-1, place_B1) > 0, inside_BC.argmax(-1, keepdim=True))
    return (block_B1 * _BLOCK + place_B1)[:, 0]


def _first_above(until_BX: Tensor, sought_B1: Tensor) -> Tensor:
    return (until_BX <= sought_B1).sum(-1, keepdim=True).clamp_max(until_BX.shape[-1] - 1)


def uniform(seed_B: Tensor, place_B: Tensor) -> Tensor:
    """float64 numbers in [0, 1), pure functions of two int64 each (SplitMix64, as in the engine's sampling)."""
    bits_B = _mix(_mix(seed_B) + place_B * _GOLDEN)
    return _shifted(bits_B, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _M1
    x = (x ^ _shifted(x, 27)) * _M2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right without the sign: torch has no arithmetic on uint64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE)
