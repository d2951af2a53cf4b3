"""One new token for each of several sequences over the paged cache, and the seam for faster ways to do it.

The reference is plain PyTorch and runs one row at a time, so that a row's outcome cannot depend on what else is in the
batch. A faster decoder must keep that promise: bit-identical results for a row whatever the other rows are.

A sequence may stand in several rows with consecutive positions, in order: row by row each sees the tokens up to its
own, those of the rows before it included, and its outcome is bit-identical to that of decoding one row a call. So
drafts are verified, and preempted sequences are read again.

Legend: B rows, P pages of the longest sequence, V vocabulary, D model width.
"""

from typing import Protocol

import torch
from torch import Tensor

from benthic.inference.decoded import Ahead, Decoded
from benthic.inference.huge_pages import use_huge_pages
from benthic.inference.native_decode import CannotDecodeNatively, NativeDecoder
from benthic.inference.paged_cache import PagedCache, PagedView
from benthic.inference.sampling import Logits
from benthic.inference.weights import round_weights
from benthic.model import LanguageModel
from benthic.model.transformer import attention_context
from benthic.precision.quantise import Precision

_DRAFT_PRECISION: Precision = "int8"
"""Of MTP modules in native decoding, and of the head they use if the vocabulary is small."""
_FEWEST_WORDS, _SHARE_OF_WORDS = 2048, 4
"""Of a larger vocabulary, a step drafts this share, and at least so many, from its beginning. Byte-pair tokenizers
number words in the order they were merged in, the most frequent first.
"""


class Decoder(Protocol):
    """A way to decode with one model. What it returns belongs to the caller: no buffer is used again."""

    name: str
    """For reports: which kernels, in a few words, and why no faster ones."""

    drafts: bool
    """Whether a step can make drafts."""

    def __call__(
        self, tokens_B: Tensor, positions_B: Tensor, table_BP: Tensor, cache: PagedCache
    ) -> tuple[Tensor, Tensor]:
        """As :func:`decode`, without the model."""

    def step(
        self, tokens_B: Tensor, positions_B: Tensor, table_BP: Tensor, cache: PagedCache, ahead: Ahead | None = None
    ) -> Decoded:
        """As a call, with what it takes to choose the next tokens, and with drafts, if it can make them."""

    def draft(
        self, module: int, hidden_BD: Tensor, tokens_B: Tensor, positions_B: Tensor, table_BP: Tensor, cache: PagedCache
    ) -> Tensor:
        """As :func:`draft`, without the model."""


def decode(
    model: LanguageModel, tokens_B: Tensor, positions_B: Tensor, table_BP: Tensor, cache: PagedCache,
    experts_BLK: Tensor | None = None, wanted_W: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One new token for each row.

    Args:
        model: its transformer's layers are read.
        tokens_B: int64, the new tokens.
        positions_B: int64, their positions, which are the tokens cached before them.
        table_BP: int32, page numbers of each row's sequence in order; unused entries are -1.
        cache: receives the new latents.
        experts_BLK: int32, over the L layers that have experts: receives the K that each token chose.
        wanted_W: rows whose logits, then (W, V), are asked for; by default all.

    Returns:
        Logits (B, V) of the token after each, and the hidden states (B, D) after the final norm.
    """
    transformer, hidden = model.transformer, []
    for row, (token, position, table_P) in enumerate(zip(tokens_B, positions_B.tolist(), table_BP, strict=True)):
        view = PagedView(cache, table_P, position, transformer.embed.weight.dtype)
        hidden_BTD, routings = transformer.hidden(token.view(1, 1), cache=view)
        hidden.append(hidden_BTD[0, 0])
        if experts_BLK is not None:
            experts_BLK[row] = torch.stack([routing.index[0, 0] for routing in routings])
    wanted = range(len(hidden)) if wanted_W is None else wanted_W.tolist()
    logits = [transformer.head(hidden[row]) for row in wanted]
    width = model.config.vocab_size
    return torch.stack(logits) if logits else hidden[0].new_empty(0, width), torch.stack(hidden)


def draft(
    model: LanguageModel, module: int, hidden_BD: Tensor, tokens_B: Tensor, positions_B: Tensor, table_BP: Tensor,
    cache: PagedCache,
) -> Tensor:  # fmt: skip
    """One step of an MTP module for each row (V3 report section 2.2).

    Args:
        model: its MTP modules are read.
        module: index of the module.
        hidden_BD: what the head sees at each position, from the transformer or the module before.
        tokens_B: int64, the token that the module joins to it.
        positions_B: int64, the index of the hidden state in its sequence.
        table_BP: int32, as for :func:`decode`; the module's latents lie in a layer of their own.
        cache: receives the module's latents.

    Returns:
        The module's hidden states (B, D), ready for the head.
    """
    rows = zip(hidden_BD, tokens_B, positions_B.tolist(), table_BP, strict=True)
    return torch.cat(
        [read_mtp(model, module, h_D[None], token[None], PagedView(cache, table_P, position, h_D.dtype))
         for h_D, token, position, table_P in rows]
    )  # fmt: skip


def read_mtp(model: LanguageModel, module: int, hidden_TD: Tensor, tokens_T: Tensor, view: PagedView) -> Tensor:
    """An MTP module over consecutive positions of one sequence in one pass: hidden states (T, D)."""
    tokens_BT = tokens_T[None]
    context = attention_context(model.config, tokens_BT, cache=view)
    hidden_BTD: Tensor = model.mtp[module](hidden_TD[None], model.transformer.embed(tokens_BT), context)[0]
    return hidden_BTD[0]


def decoder(model: LanguageModel, precision: Precision | None = None) -> Decoder:
    """The fastest way to decode with this model on this machine; its weights go to huge pages where there are such.

    Args:
        model: with a ``precision``, its weights are replaced by what they are worth in it, so that prompts are read
            with the same numbers.
        precision: that weights are kept in for decoding; by default the one they have.
    """
    found: Decoder
    try:
        found = NativeDecoder(
            model, precision=precision, draft_precision=_DRAFT_PRECISION,
            draft_words=_draft_words(model.config.vocab_size),
        )  # fmt: skip
    except CannotDecodeNatively as error:
        found = ReferenceDecoder(model, str(error))
    if precision is not None:
        round_weights(model, precision)
    use_huge_pages(model.parameters())
    return found


def _draft_words(vocabulary: int) -> int | None:
    """How many words steps draft, if not all."""
    return max(_FEWEST_WORDS, vocabulary // _SHARE_OF_WORDS) if vocabulary > _FEWEST_WORDS else None


class ReferenceDecoder:
    """The PyTorch functions of this module, for one model."""

    def __init__(self, model: LanguageModel, name: str = "PyTorch decoding") -> None:
        self.name, self.drafts = name, False
        self._model = model

    def __call__(
        self, tokens_B: Tensor, positions_B: Tensor, table_BP: Tensor, cache: PagedCache,
        experts_BLK: Tensor | None = None, wanted_W: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As :func:`decode`."""
        return decode(self._model, tokens_B, positions_B, table_BP, cache, experts_BLK, wanted_W)

    def step(
        self, tokens_B: Tensor, positions_B: Tensor, table_BP: Tensor, cache: PagedCache, ahead: Ahead | None = None
    ) -> Decoded:
        """The same, for each row."""
        assert ahead is None, "drafts are made one by one here"
        logits_BV, hidden_BD = decode(self._model, tokens_B, positions_B, table_BP, cache)
        return Decoded(tokens_B.tolist(), [Logits.of(logits_V) for logits_V in logits_BV.float().cpu()], hidden_BD)

    def draft(
        self, module: int, hidden_BD: Tensor, tokens_B: Tensor, positions_B: Tensor, table_BP: Tensor, cache: PagedCache
    ) -> Tensor:
        """As :func:`draft`."""
        return draft(self._model, module, hidden_BD, tokens_B, positions_B, table_BP, cache)
