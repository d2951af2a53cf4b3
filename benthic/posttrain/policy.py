"""A model as the policy that GRPO trains: what its answers' probabilities are, and what its MTP modules make of them.

Shapes: N answers, T positions, D model width, M MoE layers, K experts of a token, J depths of multi-token prediction,
E experts, V vocabulary, S sampled tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from benthic.model import LanguageModel
from benthic.model.moe import Routing
from benthic.model.transformer import attention_context
from benthic.ops.cross_entropy import IGNORE, linear_cross_entropy
from benthic.ops.routing import expert_load


class Seen(NamedTuple):
    """What a policy makes of answers."""

    logprob_NT: Tensor
    """Of each sampled token, in its place; 0 elsewhere."""
    mtp_nats_J: Tensor
    """Mean cross-entropy of the sampled tokens by each MTP module."""
    load_ME: Tensor
    """Tokens that each expert of the transformer received, padding left out."""


class Policy(nn.Module):
    """A language model with its answers' probabilities as one module, so that precision can be applied to all of it."""

    def __init__(self, model: LanguageModel, temperature: float) -> None:
        super().__init__()
        self.model, self._temperature = model, temperature

    def forward(
        self, tokens_NT: Tensor, sampled_NT: Tensor, end_N: Tensor, chosen_MNTK: Tensor | None, mtp: bool
    ) -> Seen:
        """What is seen in some answers.

        Args:
            tokens_NT: prompts, answers and padding.
            sampled_NT: which of them have been sampled.
            end_N: where padding begins.
            chosen_MNTK: the experts that the tokens (without the last) visited when they were sampled.
            mtp: whether MTP modules take part. What they learn stays in them: the states below them, the embedding and
                the head belong to the policy.
        """
        transformer = self.model.transformer
        hidden_NTD, routings = transformer.hidden(tokens_NT[:, :-1], chosen_MBTK=chosen_MNTK)
        logprob_NT = sampled_logprobs(hidden_NTD, transformer.head.weight, tokens_NT, sampled_NT, self._temperature)
        nats = self._mtp_nats(hidden_NTD.detach(), tokens_NT, sampled_NT) if mtp else []
        real_NT = torch.arange(tokens_NT.shape[1] - 1, device=end_N.device) < end_N[:, None] - 1
        return Seen(logprob_NT, torch.stack(nats) if nats else hidden_NTD.new_zeros(0), _loads(routings, real_NT))

    def _mtp_nats(self, hidden_NTD: Tensor, tokens_NT: Tensor, sampled_NT: Tensor) -> list[Tensor]:
        transformer, found = self.model.transformer, []
        for depth, module in enumerate(self.model.mtp, start=1):
            length = hidden_NTD.shape[1] - 1
            embedding_NTD = transformer.embed(tokens_NT[:, depth : depth + length]).detach()
            context = attention_context(self.model.config, tokens_NT[:, :length])
            hidden_NTD = module(hidden_NTD[:, :length], embedding_NTD, context)[0]
            target_NT = tokens_NT[:, depth + 1 :].where(sampled_NT[:, depth + 1 :], IGNORE)
            head_VD = transformer.head.weight.detach()
            found.append(linear_cross_entropy(hidden_NTD.flatten(0, 1), head_VD, target_NT.flatten()))
        return found


def sampled_logprobs(
    hidden_NTD: Tensor, head_VD: Tensor, tokens_NT: Tensor, sampled_NT: Tensor, temperature: float
) -> Tensor:
    """Log-probabilities (N, T) of the sampled tokens, each in its place, and 0 elsewhere.

    Args:
        hidden_NTD: (N, T - 1, D), what the head reads.
        head_VD: its weight.
        tokens_NT: those read, and the last. sampled_NT: which of them count.
        temperature: that logits are divided by; 0 and 1 leave them.
    """
    before_NT = sampled_NT[:, 1:]
    logits_SV = (hidden_NTD[before_NT] @ head_VD.T).float()
    if temperature not in (0, 1):
        logits_SV = logits_SV / temperature
    logprob_S = logits_SV.log_softmax(-1).gather(-1, tokens_NT[:, 1:][before_NT][:, None])[:, 0]
    empty_NT = torch.zeros(tokens_NT.shape, dtype=logprob_S.dtype, device=logprob_S.device)
    return empty_NT.masked_scatter(sampled_NT, logprob_S)


def _loads(routings: list[Routing], real_NT: Tensor) -> Tensor:
    if not routings:
        return real_NT.new_zeros(0, 1, dtype=torch.int64)
    return torch.stack([expert_load(routing.index[real_NT], routing.scores.shape[-1]) for routing in routings])
