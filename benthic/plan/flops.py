"""Arithmetic and cache of one token: what a step must compute, and what decoding must keep.

A matrix of n parameters costs a token 2n operations forward and 4n backward. Attention adds the products of queries
with keys and of weights with values, which no parameter count shows: per layer 2 H (qk_head_dim + v_head_dim)
operations for each token attended to.
"""

from benthic.config.schema import ModelConfig
from benthic.plan.counts import activated, main_model, mtp_modules
from benthic.precision.latents import CACHE_DTYPES, CachePrecision, LatentFormat


def forward_flops(config: ModelConfig, length: int, *, causal: bool = True, mtp: bool = False) -> float:
    """Operations of the forward pass for one token, on average over a sequence.

    Args:
        config: sizes of the model.
        length: tokens in the sequence.
        causal: a token attends to (length + 1) / 2 others on average; without it, to all of them.
        mtp: count the MTP modules, and the head once more for each.
    """
    main = activated(main_model(config), config)
    parameters, layers = main.total - main.embedding, config.num_hidden_layers
    if mtp:
        parameters += activated(mtp_modules(config), config).total + config.num_nextn_predict_layers * main.head
        layers += config.num_nextn_predict_layers
    attended = (length + 1) / 2 if causal else length
    head_dims = config.qk_head_dim + config.v_head_dim
    return 2 * parameters + 2 * layers * config.num_attention_heads * head_dims * attended


def training_flops(config: ModelConfig, length: int, *, causal: bool = True, mtp: bool = False) -> float:
    """Operations of forward and backward pass for one token: 250 GFLOP for V3 at 4K (arXiv 2505.09343 table 4)."""
    return 3 * forward_flops(config, length, causal=causal, mtp=mtp)


def cache_bytes_per_token(config: ModelConfig, precision: CachePrecision = "bf16") -> int:
    """Bytes the latent cache keeps for one token over all layers: 70,272 for V3 in bf16, 40,016 in fp8."""
    return config.num_hidden_layers * LatentFormat(config, CACHE_DTYPES[precision]).row_bytes
