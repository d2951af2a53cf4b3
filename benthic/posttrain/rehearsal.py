"""Conversations that MTP modules read again while the model below them learns from rewards.

Answers to problems may be a token long, and drafts of anything else would be forgotten as the model changes. So the
modules go on learning from fine-tuning's conversations; the model does not, whose rewards are elsewhere.

Shapes: B sequences, S tokens, T positions, D model width, J depths of multi-token prediction, K = 1 + J.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from benthic.config.schema import RunConfig
from benthic.data.batches import Batch
from benthic.data.manifest import FILE_NAME
from benthic.data.shards import TokenStore
from benthic.data.tokenizer import Tokenizer
from benthic.model import LanguageModel
from benthic.model.transformer import attention_context
from benthic.ops.cross_entropy import linear_cross_entropy
from benthic.posttrain.packing import AnswerStore, PackedBatches
from benthic.posttrain.sft_data import FOLDER
from benthic.precision.compute import Compute
from benthic.train.compute import compute_in
from benthic.train.objective import prediction_targets


class Rehearsal:
    """Packed conversations, so many sequences a step."""

    def __init__(self, batches: PackedBatches, sequences: int) -> None:
        self._batches, self._sequences = batches, sequences

    def batch(self, step: int) -> Batch:
        """Those of a step."""
        return self._batches.at(step * self._sequences, self._sequences)


def open_rehearsal(config: RunConfig, out: Path, tokenizer: Tokenizer, sequences: int, seed: int) -> Rehearsal | None:
    """Over the conversations that fine-tuning learnt from, in this run or in the one that it began with, if any."""
    folders = [out, *([Path(config.posttrain.base)] if config.posttrain.base else [])]
    folder = next((one / FOLDER for one in folders if (one / FOLDER / FILE_NAME).is_file()), None)
    depths = config.model.num_nextn_predict_layers
    if folder is None or not sequences or not depths:
        return None
    store = TokenStore(folder, "train")
    if store.manifest.tokenizer_sha256 != tokenizer.fingerprint:
        return None
    answers = AnswerStore(store)
    length = max(config.train.sequence_length, int(answers.lengths.max()))
    count = len(answers.lengths)
    packed = PackedBatches(answers, [count], [1.0], length, 1 + depths, tokenizer.eos_id, seed)
    return Rehearsal(packed, sequences)


def rehearse(model: LanguageModel, batch: Batch, weight: float, compute: Compute) -> Tensor:
    """Accumulate the gradients of MTP modules alone, of their cross-entropy times ``weight``; returns it (J,)."""
    nats_J: Tensor = compute_in(compute, _Modules(model), *batch)
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
        document_BT = None if document_BS is None else document_BS[:, :length]
        head_VD, nats = transformer.head.weight.detach(), []
        with torch.no_grad():
            hidden_BTD, _ = transformer.hidden(tokens_BS[:, :length], document_BT=document_BT)
        context = attention_context(self.model.config, tokens_BS[:, :length], document_BT)
        for depth, module in enumerate(modules, start=1):
            embedding_BTD = transformer.embed(tokens_BS[:, depth : depth + length]).detach()
            hidden_BTD = module(hidden_BTD, embedding_BTD, context)[0]
            nats.append(linear_cross_entropy(hidden_BTD.flatten(0, 1), head_VD, targets_KBT[depth].flatten()))
        return torch.stack(nats)
