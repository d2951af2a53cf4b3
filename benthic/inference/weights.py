"""Which weights of a model are kept in fewer bits, and as matrices of what shape; applied to a model from outside.

All matrices of attention and of feed-forward layers are, and in ``int4`` the head is ``int8``. The embedding, of which
a token reads one row, the routers, whose choices hang on small differences, and norms stay as they are. The up-
projection of latents is rounded as absorbed attention multiplies with it: per head a key part, transposed, and a value
part.

Shapes: S stacked matrices, M rows, K columns, H heads, N nope width, V value width, C latent.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from benthic.model import LanguageModel
from benthic.model.layers import SwiGLU
from benthic.model.mla import LatentAttention
from benthic.model.moe import MoE
from benthic.model.mtp import MTPModule
from benthic.model.transformer import Block
from benthic.precision.quantise import Precision, head_precision, rounded


def blocks_of(model: LanguageModel) -> list[Block]:
    """The transformer's blocks, then those of the MTP modules: in the order of the cache's layers."""
    blocks = [*model.transformer.layers, *(mtp.block for mtp in mtp_modules(model))]
    return [block for block in blocks if isinstance(block, Block)]


def mtp_modules(model: LanguageModel) -> list[MTPModule]:
    """The MTP modules, typed."""
    return [module for module in model.mtp if isinstance(module, MTPModule)]


def block_matrices(block: Block) -> dict[str, Tensor]:
    """Views (S, M, K) of a block's matrices, under the names that native decoding has for them."""
    found = _attention_matrices(block.attention)
    dense = block.ffn if isinstance(block.ffn, SwiGLU) else block.ffn.shared
    if dense is not None:
        found["gate_up"] = dense.gate_up.weight.detach().unflatten(0, (2, -1))
        found["down"] = dense.down.weight.detach().unsqueeze(0)
    if isinstance(block.ffn, MoE):
        experts = block.ffn.experts
        found["expert_gate_up"] = experts.gate_up.detach().unflatten(1, (2, -1)).flatten(0, 1)
        found["expert_down"] = experts.down.detach()
    return found


def _attention_matrices(attention: LatentAttention) -> dict[str, Tensor]:
    config = attention.config
    kv_b_HXC = attention.kv_b.weight.detach().unflatten(0, (config.num_attention_heads, -1))
    key_HNC, value_HVC = kv_b_HXC.split((config.qk_nope_head_dim, config.v_head_dim), 1)
    linears = {"kv_a": attention.kv_a, "o": attention.o}
    if config.q_lora_rank is None:
        linears["q_b"] = attention.q
    else:
        linears |= {"q_a": attention.q_a, "q_b": attention.q_b}
    found = {name: linear.weight.detach().unsqueeze(0) for name, linear in linears.items()}
    return found | {"key": key_HNC.transpose(1, 2), "value": value_HVC}


@torch.no_grad()
def round_weights(model: LanguageModel, precision: Precision) -> LanguageModel:
    """Replace a model's weights by what they are worth in ``precision``, in place and in the dtype they have.

    What the PyTorch forms compute with afterwards, prefill among them, are the numbers that native decoding in this
    precision reads.
    """
    for weight, kept in _rounded_matrices(model, precision):
        for weight_MK in weight if weight.dim() == 3 else weight[None]:
            weight_MK.copy_(rounded(weight_MK, kept))
    return model


def _rounded_matrices(model: LanguageModel, precision: Precision) -> Iterator[tuple[Tensor, Precision]]:
    for block in blocks_of(model):
        for weight_SMK in block_matrices(block).values():
            yield weight_SMK, precision
    for mtp in mtp_modules(model):
        yield mtp.project.weight.detach(), precision
    yield model.transformer.head.weight.detach(), head_precision(precision)
