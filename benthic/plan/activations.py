"""What a token's way through a layer leaves in memory for the backward pass, in bytes, from the config alone.

It depends on who computes. Fused kernels (``benthic/ops/native``, on CPUs) keep what mathematics asks for. PyTorch's
own operations, which run everywhere else, also keep what lies between them: padded copies of queries, keys and values,
SiLU's output, and in bf16 the inputs of norms in fp32. Recomputation (V3 report section 3.2.3) lets go of less there,
for it does not reach such copies. The tests hold these formulas against what autograd really keeps.
"""

from dataclasses import dataclass, replace
from typing import Literal

from benthic.config.schema import ModelConfig
from benthic.precision.blocks import BLOCK

_INDEX = 8
"""Bytes of an int64."""
_EXACT = 4
"""Bytes of what is fp32 in any arithmetic."""


@dataclass(frozen=True)
class Arithmetic:
    """How a step computes."""

    compute: Literal["fp32", "fp32-tiles", "bf16", "fp8"]
    recompute: bool = False
    fused: bool = False
    """By kernels of Benthic's own rather than by PyTorch's operations."""

    @property
    def number(self) -> int:
        """Bytes of an activation between matrix products."""
        return 2 if self.compute == "bf16" else _EXACT

    def linear_input(self, width: int, *, readers: int = 1, computed_again: bool = False) -> float:
        """Kept of what only linear layers read: FP8 takes a copy for each of them, which recomputation does not."""
        if self.compute == "fp8":
            return readers * fp8_bytes(width)
        return 0 if self.recompute and computed_again else width * self.number

    def norm(self, width: int, *, lies_in: int | None = None) -> float:
        """Kept of a norm's input (which may be part of a wider tensor) and of its root mean square."""
        as_it_came = self.number * (lies_in or width)
        if self.compute == "bf16" and not self.fused:
            # A copy in fp32 and the quotient before the weight; recomputing the output takes the input besides.
            return (_EXACT + self.number) * width + _EXACT + (as_it_came if self.recompute else 0)
        return as_it_came + _EXACT


def fp8_bytes(width: int) -> int:
    """A row in E4M3 with an fp32 scale for every 128 numbers."""
    return width + _EXACT * -(-width // BLOCK)


def block_bytes(config: ModelConfig, arithmetic: Arithmetic, *, dense: bool, messages: float | None = None) -> float:
    """Kept per token by a block, its input included and its output not, which is the next one's input.

    Args:
        dense: whether its feed-forward layer is one, or experts.
        messages: to other ranks for each token, if its experts are divided among ranks.
    """
    norms = 2 * arithmetic.norm(config.hidden_size)
    ffn = dense_bytes(config, arithmetic) if dense else moe_bytes(config, arithmetic, messages)
    return norms + attention_bytes(config, arithmetic) + ffn


def mtp_bytes(config: ModelConfig, arithmetic: Arithmetic, *, messages: float | None = None) -> float:
    """Kept per token by an MTP module, the embeddings and states it joins included; arguments as for a block."""
    once = replace(arithmetic, recompute=False)
    joined = once.linear_input(2 * config.hidden_size)
    return 3 * once.norm(config.hidden_size) + joined + block_bytes(config, arithmetic, dense=False, messages=messages)


def head_bytes(config: ModelConfig, arithmetic: Arithmetic, tokens: int, predictions: int) -> float:
    """Kept by the last norm, head and losses of so many tokens, of which the main model and MTP make ``predictions``.

    The loss computes its gradients at once: for each prediction those of the states, and of the head's weights.
    """
    width, once = config.hidden_size, replace(arithmetic, recompute=False)
    gradients = tokens * width * arithmetic.number + config.vocab_size * width * _EXACT
    return tokens * once.norm(width) + predictions * gradients


def attention_bytes(config: ModelConfig, arithmetic: Arithmetic) -> float:
    """Kept per token by multi-head latent attention, from the output of the norm before it."""
    rank, latent = config.q_lora_rank, config.kv_lora_rank
    queries = 0.0
    if rank is not None:
        queries = arithmetic.norm(rank) + arithmetic.linear_input(rank, computed_again=True)
    keys = arithmetic.norm(latent, lies_in=config.latent_dim) + arithmetic.linear_input(latent, computed_again=True)
    projected_down = arithmetic.linear_input(config.hidden_size, readers=2, computed_again=True)
    return projected_down + queries + keys + _core_bytes(config, arithmetic)


def _core_bytes(config: ModelConfig, arithmetic: Arithmetic) -> float:
    """Queries, keys, values, output and normaliser of each head, and what the projection after them reads."""
    a, heads, value = arithmetic.number, config.num_attention_heads, config.v_head_dim
    projected_up = arithmetic.linear_input(heads * value)
    normaliser = heads * _EXACT
    if not arithmetic.fused:
        # All four are as wide as the widest; what is read afterwards is a copy without the padding.
        return 4 * heads * max(config.qk_head_dim, value) * a + normaliser + projected_up
    outputs = heads * value * a if arithmetic.compute == "fp8" else 0
    inputs = 0 if arithmetic.recompute else heads * (config.qk_head_dim + config.qk_nope_head_dim + value) * a
    return inputs + config.qk_rope_head_dim * a + outputs + normaliser + projected_up


def dense_bytes(config: ModelConfig, arithmetic: Arithmetic) -> float:
    """Kept per token by a dense feed-forward layer, from the output of the norm before it."""
    inputs = arithmetic.linear_input(config.hidden_size, computed_again=True)
    return inputs + _swiglu_bytes(config.intermediate_size, arithmetic)


def _swiglu_bytes(width: int, arithmetic: Arithmetic) -> float:
    """Gate and up, SiLU of the gate where it is computed by itself, and what the projection down reads."""
    between = (2 if arithmetic.fused else 3) * width * arithmetic.number
    return between + arithmetic.linear_input(width, computed_again=True)


def moe_bytes(config: ModelConfig, arithmetic: Arithmetic, messages: float | None = None) -> float:
    """Kept per token by router, routed and shared experts, from the output of the norm before them."""
    width, hidden, chosen = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    if messages is None:
        experts = _expert_bytes(width, hidden, chosen, 1, arithmetic)
    else:
        # Experts have a copy of the token for each pair; besides, who sent it, and where each pair goes and came from.
        experts = _expert_bytes(width, hidden, chosen, chosen, arithmetic)
        experts += 2 * chosen * _INDEX + messages * _INDEX
        experts += 0 if arithmetic.compute == "fp8" else chosen * width * arithmetic.number
    return _router_bytes(config, arithmetic) + experts + _shared_bytes(config, arithmetic)


def _router_bytes(config: ModelConfig, arithmetic: Arithmetic) -> float:
    """Affinities, chosen experts and their weights; besides, unless computed again, the input as it is and in fp32."""
    chosen, width = config.num_experts_per_tok, config.hidden_size
    inputs = (_EXACT, arithmetic.number) if arithmetic.compute == "bf16" else (_EXACT,)
    copies = 0 if arithmetic.recompute else sum(inputs) * width
    weights = _EXACT * (chosen + 1) if config.norm_topk_prob else 0
    balance = _EXACT  # the sum of a token's affinities
    return copies + config.n_routed_experts * _EXACT + chosen * _INDEX + weights + balance


def _expert_bytes(width: int, hidden: int, chosen: int, inputs: int, arithmetic: Arithmetic) -> float:
    """Order, place, token and weight of each row, and the inputs of SwiGLU; in FP8 also copies of so many inputs."""
    rows = chosen * (3 * _INDEX + _EXACT)
    if arithmetic.compute == "fp8":
        return rows + inputs * fp8_bytes(width) + chosen * fp8_bytes(2 * hidden)
    return rows + chosen * 2 * hidden * arithmetic.number


def _shared_bytes(config: ModelConfig, arithmetic: Arithmetic) -> float:
    hidden = config.n_shared_experts * config.moe_intermediate_size
    if not hidden:
        return 0
    if arithmetic.compute == "fp8":  # computed as an expert that every token chooses
        return _expert_bytes(config.hidden_size, hidden, 1, 1, arithmetic)
    return _swiglu_bytes(hidden, arithmetic)
