"""How likely a model finds texts, many at once.

Sequences are padded on the right, where causal attention does not look, and no expert drops tokens: a text's
likelihood does not depend on what it was batched with, but for rounding.

Shapes: B sequences, T tokens, N scored tokens, D model width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError, WorkFailed
from benthic.model import LanguageModel

TOKENS_AT_ONCE = 4096
"""Of a batch, its padding counted; a longer sequence is read alone."""
LOGITS_AT_ONCE = 1 << 26
"""Numbers that are held at a time: 256 MiB in fp32."""

Report = Callable[[int, int], None]
"""Called with how many are done, and of how many."""


class Passage(NamedTuple):
    """Token ids to be read, at least one, and those after them, to be scored."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """Of a passage's continuation."""

    logprob: float
    """Natural logarithm of its probability."""
    greedy: bool
    """Whether each of its tokens is the likeliest there, so that it would be written."""


@torch.inference_mode()
def likelihoods(
    model: LanguageModel, passages: Sequence[Passage], report: Report = lambda done, total: None
) -> list[Likelihood]:
    """The likelihood of each continuation after its context.

    Passages that differ in their last token alone, as choices of one letter do, are read once.

    Raises:
        InputError: a passage is longer than the model takes, or has no context.
        WorkFailed: the model's logits are not finite.
    """
    longest = model.config.max_position_embeddings
    readers: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(passages):
        read = (*context, *continuation[:-1])
        if len(read) > longest:
            raise InputError(f"{len(read)} tokens are to be read, and the model takes {longest}")
        if not context:
            raise InputError("a continuation can only be scored after at least one token")
        readers.setdefault(read, []).append(number)
    found = [Likelihood(0.0, True)] * len(passages)
    done = 0
    for batch in _batches(sorted(readers, key=len, reverse=True)):
        hidden_BTD = model.transformer.hidden(_padded(batch, model.transformer.embed.weight.device))[0]
        for tokens, hidden_TD in zip(batch, hidden_BTD, strict=True):
            for number in readers[tokens]:
                context, continuation = passages[number]
                if continuation:
                    found[number] = _score(model, hidden_TD[len(context) - 1 : len(tokens)], continuation)
                done += 1
        report(done, len(passages))
    return found


def split(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a text and of what follows it, as they are when both are read as one text.

    White space at the end of the context goes to the continuation, where tokenizers have it. Where a token would
    reach across, each is encoded by itself. (lm-eval does the first; in the second it miscounts.)
    """
    bare = context.rstrip()
    context, continuation = bare, context[len(bare) :] + continuation
    whole, first, second = tokenizer.encode_batch([context + continuation, context, continuation])
    joined = whole[: len(first)] == first and len(whole) > len(first)
    return first, whole[len(first) :] if joined else second


def windows(ids: Sequence[int], begin: int, length: int) -> Iterable[Passage]:
    """A text of any length as passages that a model of this context takes: every token is scored once.

    The first follows ``begin`` alone. Each further window begins with the token before it; the last reaches back as
    far as the model takes, so that its tokens are not scored after next to nothing (as lm-eval's rolling windows).
    """
    whole = [begin, *ids]
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        yield Passage(whole[max(0, end - length) : start + 1], ids[start:end])


def _batches(rows: Sequence[tuple[int, ...]]) -> Iterable[list[tuple[int, ...]]]:
    """Rows, the longest first, in batches of bounded size."""
    start = 0
    while start < len(rows):
        count = max(1, TOKENS_AT_ONCE // len(rows[start]))
        yield list(rows[start : start + count])
        start += count


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    tokens_BT = torch.zeros(len(rows), len(rows[0]), dtype=torch.int64)
    for tokens_T, row in zip(tokens_BT, rows, strict=True):
        tokens_T[: len(row)] = torch.tensor(row)
    return tokens_BT.to(device)


def _score(model: LanguageModel, hidden_ND: Tensor, continuation: Sequence[int]) -> Likelihood:
    """Of N tokens, from the states before them."""
    target_N = torch.tensor(continuation, device=hidden_ND.device)
    step = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    total, greedy = 0.0, True
    for states, targets in zip(hidden_ND.split(step), target_N.split(step), strict=True):
        logits_NV = model.transformer.head(states).float()
        chosen_N = logits_NV.gather(1, targets[:, None])[:, 0]
        total += float((chosen_N - logits_NV.logsumexp(1)).double().sum())
        greedy = greedy and bool((chosen_N == logits_NV.amax(1)).all())
    if not math.isfinite(total):
        raise WorkFailed("the model's logits are not finite: its weights are damaged, or its precision is too low")
    return Likelihood(total, greedy)
