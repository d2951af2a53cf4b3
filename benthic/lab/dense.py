"""A dense transformer with ordinary multi-head attention: what the mixture of experts is measured against.

As in Llama 2: RMSNorm before each part, rotary positions over whole heads, SwiGLU, embedding and head apart, no biases.
It is trained by the same trainer and made of the same operations and kernels as the rest of the package, so that a
comparison is one of models.

Shapes: B batch, T time, D model, H heads, W head width, P = W / 2 pairs.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from benthic.config.base import Positive, Settings
from benthic.config.schema import ModelConfig
from benthic.errors import InputError
from benthic.model import Trainable, Trunk
from benthic.model.layers import RMSNorm, SwiGLU
from benthic.model.moe import Routing
from benthic.ops.attention import causal_attention
from benthic.ops.rope import rope_angles, rotate_tail


class DenseSizes(Settings):
    """Sizes of the baseline; vocabulary, rotary base, norms' epsilon and initial spread are those of ``[model]``."""

    hidden_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    head_dim: Annotated[int, Field(gt=0, multiple_of=2)]
    intermediate_size: Positive

    @property
    def attention_width(self) -> int:
        """Numbers in all heads of a query."""
        return self.num_attention_heads * self.head_dim


class MultiHeadAttention(nn.Module):
    """Attention in which every head has keys and values of its own."""

    def __init__(self, sizes: DenseSizes) -> None:
        super().__init__()
        self.heads = (sizes.num_attention_heads, sizes.head_dim)
        width = sizes.hidden_size
        self.q, self.k, self.v = (nn.Linear(width, sizes.attention_width, bias=False) for _ in range(3))
        self.o = nn.Linear(sizes.attention_width, width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TP: Tensor, sin_TP: Tensor, document_BT: Tensor | None) -> Tensor:
        """Output (B, T, D)."""
        q_BTHW, k_BTHW, v_BTHW = (part(x_BTD).unflatten(-1, self.heads) for part in (self.q, self.k, self.v))
        q_BTHW, k_BTHW = rotate_tail(q_BTHW, cos_TP, sin_TP), rotate_tail(k_BTHW, cos_TP, sin_TP)
        shared_BT0 = q_BTHW.new_empty(*x_BTD.shape[:2], 0)
        out_BTHW = causal_attention(
            q_BTHW, torch.cat((k_BTHW, v_BTHW), -1), shared_BT0, scale=self.heads[1] ** -0.5, document_BT=document_BT
        )
        out_BTD: Tensor = self.o(out_BTHW.flatten(-2))
        return out_BTD


class DenseBlock(nn.Module):
    """Attention and SwiGLU, each normalised before and added back."""

    def __init__(self, sizes: DenseSizes, eps: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(sizes.hidden_size, eps)
        self.attention = MultiHeadAttention(sizes)
        self.ffn_norm = RMSNorm(sizes.hidden_size, eps)
        self.ffn = SwiGLU(sizes.hidden_size, sizes.intermediate_size)

    def forward(self, x_BTD: Tensor, cos_TP: Tensor, sin_TP: Tensor, document_BT: Tensor | None) -> Tensor:
        """Output (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TP, sin_TP, document_BT)
        out_BTD: Tensor = x_BTD + self.ffn(self.ffn_norm(x_BTD))
        return out_BTD


class DenseTransformer(Trunk):
    """Token ids (B, T) to logits (B, T, V)."""

    def __init__(self, config: ModelConfig, sizes: DenseSizes) -> None:
        super().__init__()
        self.rotary = config.model_copy(update={"qk_rope_head_dim": sizes.head_dim})
        self.embed = nn.Embedding(config.vocab_size, sizes.hidden_size)
        self.layers = nn.ModuleList(DenseBlock(sizes, config.rms_norm_eps) for _ in range(sizes.num_hidden_layers))
        self.norm = RMSNorm(sizes.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(sizes.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        logits_BTV: Tensor = self.head(self.hidden(tokens_BT)[0])
        return logits_BTV

    def hidden(self, tokens_BT: Tensor, *, document_BT: Tensor | None = None) -> tuple[Tensor, list[Routing]]:
        """States after the final norm (B, T, D); nothing is routed."""
        cos_TP, sin_TP = rope_angles(self.rotary, torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        x_BTD: Tensor = self.embed(tokens_BT)
        for block in self.layers:
            x_BTD = block(x_BTD, cos_TP, sin_TP, document_BT)
        normed_BTD: Tensor = self.norm(x_BTD)
        return normed_BTD, []


class DenseModel(Trainable):
    """The baseline as it is trained."""

    def __init__(self, config: ModelConfig, sizes: DenseSizes) -> None:
        super().__init__()
        self.transformer = DenseTransformer(config, sizes)
        self.mtp = nn.ModuleList()

    def training_hidden(
        self, tokens_BS: Tensor, document_BS: Tensor | None = None, *, depths: int | None = None
    ) -> tuple[list[Tensor], list[Routing]]:
        """States of the one prediction, the next token's."""
        hidden_BTD, routings = self.transformer.hidden(tokens_BS, document_BT=document_BS)
        return [hidden_BTD], routings


class Dense:
    """The architecture to give to :func:`benthic.train.loop.train`."""

    def __init__(self, sizes: DenseSizes) -> None:
        self.sizes = sizes

    def build(self, config: ModelConfig) -> DenseModel:
        """A model whose weights are not set yet.

        Raises:
            InputError: ``config`` has settings that the baseline would not follow.
        """
        if config.num_nextn_predict_layers:
            raise InputError(
                f"model.num_nextn_predict_layers={config.num_nextn_predict_layers} must be 0: the dense baseline "
                "predicts the next token only"
            )
        if config.rope_scaling is not None:
            raise InputError("model.rope_scaling: the dense baseline does not scale positions")
        return DenseModel(config, self.sizes)

    def training_flops(self, config: ModelConfig, length: int, *, mtp: bool = False) -> float:
        """Operations for one token, counted as in :mod:`benthic.plan.flops`."""
        sizes = self.sizes
        layer = sizes.hidden_size * (4 * sizes.attention_width + 3 * sizes.intermediate_size)
        parameters = sizes.num_hidden_layers * layer + sizes.hidden_size * config.vocab_size
        attention = 2 * sizes.num_hidden_layers * sizes.attention_width * (length + 1) / 2
        return 3 * (2 * parameters + 2 * attention)

    def settings(self) -> dict[str, Any]:
        """The kind and its sizes."""
        return {"kind": "dense", **self.sizes.model_dump(mode="json")}
