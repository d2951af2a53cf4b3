"""What MTP modules read again while the model below them learns something else.

Fine-tuning and rewards move the model, and drafts of all that they do not speak of would be accepted less and less. So
in every step the modules read some of the text that pretraining read, and conversations where those are not learnt from
anyway, and learn to draft what the model, as it is by now, would say there. The model does not learn from it.

Shapes: B sequences, S tokens, T positions, D model width, J depths of multi-token prediction, K = 1 + J.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from benthic.config.schema import RunConfig
from benthic.data.batches import Batch, Batches
from benthic.data.manifest import FILE_NAME
from benthic.data.shards import TokenStore
from benthic.data.tokenizer import Tokenizer
from benthic.files import sha256
from benthic.model import LanguageModel
from benthic.model.transformer import attention_context
from benthic.ops.cross_entropy import IGNORE
from benthic.ops.divergence import linear_divergence
from benthic.plan.flops import training_flops
from benthic.posttrain.packing import AnswerStore, PackedBatches
from benthic.posttrain.prepared import prepared_in, prepared_store
from benthic.posttrain.sft_data import FOLDER
from benthic.precision.compute import Compute
from benthic.train.compute import compute_in
from benthic.train.objective import prediction_targets

_TEXT = "data"
_WEIGHT = 4.0
"""Of the distance, beside MTP's losses on answers, whose gradients are many times as large."""


class Sequences(Protocol):
    """Sequences in an endless stream."""

    def at(self, index: int, count: int) -> Batch:
        """Those from ``index`` on."""
        ...


class Rehearsal:
    """So many sequences of each source a step."""

    def __init__(self, config: RunConfig, sources: Sequence[Sequences], sequences: int) -> None:
        self._config, self._sources, self._sequences = config, sources, sequences

    def rehearse(self, model: LanguageModel, step: int, compute: Compute) -> list[float]:
        """Accumulate the gradients of MTP modules alone; how far each depth is from the model (J,), in nats."""
        batches = [source.at(step * self._sequences, self._sequences) for source in self._sources]
        found_J = torch.stack([rehearse(model, batch, _WEIGHT / len(batches), compute) for batch in batches]).mean(0)
        return [float(nats) for nats in found_J]

    @property
    def flops(self) -> float:
        """Operations of a step: the model's forward pass, the modules' training."""
        model, length = self._config.model, self._config.train.sequence_length
        below, all_of_it = (training_flops(model, length, mtp=mtp) for mtp in (False, True))
        return len(self._sources) * self._sequences * length * (below / 3 + all_of_it - below)


def open_rehearsal(
    config: RunConfig, out: Path, tokenizer: Tokenizer, sequences: int, *, conversations: bool
) -> Rehearsal | None:
    """Over what pretraining read, in this run or in the one that it began with, and fine-tuning's conversations too.

    None where none of it is there, written in the same tokens, or no MTP modules learn.
    """
    if not sequences or not config.model.num_nextn_predict_layers or not config.train.schedule.mtp_loss_weight:
        return None
    sources: list[Sequences] = []
    if text := prepared_store(config, out, _TEXT, "train", tokenizer):
        sources.append(_text(config, text))
    if conversations and (store := prepared_store(config, out, FOLDER, "train", tokenizer)):
        sources.append(_conversations(config, store, tokenizer))
    return Rehearsal(config, sources, sequences) if sources else None


def borrowed(config: RunConfig, out: Path, tokenizer: Tokenizer, sequences: int) -> dict[str, str]:
    """Hashes of what lies in the run that this one began with, and may be read: without it a run cannot go on."""
    folders = [prepared_in(config, out, name, tokenizer) for name in (_TEXT, FOLDER)] if sequences else []
    return {f"rehearsed {one.name}": sha256(one / FILE_NAME) for one in folders if one and one.parent != out}


def _text(config: RunConfig, store: TokenStore) -> Sequences:
    lookahead = 1 + config.model.num_nextn_predict_layers
    train, masked = config.train, config.data.mask_documents
    return Batches(store, train.sequence_length, lookahead, seed=train.seed, mask_documents=masked)


def _conversations(config: RunConfig, store: TokenStore, tokenizer: Tokenizer) -> Sequences:
    answers = AnswerStore(store)
    length = max(config.train.sequence_length, int(answers.lengths.max()))
    lookahead = 1 + config.model.num_nextn_predict_layers
    return PackedBatches(answers, [len(answers.lengths)], [1.0], length, lookahead, tokenizer.eos_id, config.train.seed)


def rehearse(model: LanguageModel, batch: Batch, weight: float, compute: Compute) -> Tensor:
    """Accumulate the gradients of MTP modules alone, of how far they are from the model times ``weight``.

    Returns that distance (J,): KL(model || module) in nats, over the tokens of the batch that are to be learnt.
    """
    nats_J: Tensor = compute_in(compute, _Modules(model), *batch)
    if nats_J.requires_grad:  # not so where low-rank adapters leave the modules as they are
        (weight * nats_J.mean()).backward()
    return nats_J.detach()


class _Modules(nn.Module):
    """The MTP modules over a trunk that stands still, as one module, so that precision can be applied to all of it."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BS: Tensor, document_BS: Tensor | None, learn_BS: Tensor | None) -> Tensor:
        transformer, modules = self.model.transformer, self.model.mtp
        targets_KBT = prediction_targets(tokens_BS, document_BS, 1 + len(modules), learn_BS)
        length = targets_KBT.shape[-1]
        # A module drafts at a position what the model says ``depth`` positions later.
        read = slice(None, length + len(modules))
        document_BR = None if document_BS is None else document_BS[:, read]
        with torch.no_grad():
            model_BRD, _ = transformer.hidden(tokens_BS[:, read], document_BT=document_BR)
        document_BT = None if document_BS is None else document_BS[:, :length]
        context = attention_context(self.model.config, tokens_BS[:, :length], document_BT)
        hidden_BTD, nats = model_BRD[:, :length], []
        for depth, module in enumerate(modules, start=1):
            embedding_BTD = transformer.embed(tokens_BS[:, depth : depth + length]).detach()
            hidden_BTD = module(hidden_BTD, embedding_BTD, context)[0]
            counted_BT = targets_KBT[depth] != IGNORE
            said_BTD = model_BRD[:, depth : depth + length]
            nats.append(linear_divergence(hidden_BTD[counted_BT], said_BTD[counted_BT], transformer.head.weight))
        return torch.stack(nats)
