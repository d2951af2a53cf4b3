"""The one table of weight names, used in both directions between Benthic's parameters and published checkpoints,
and the names that llama.cpp's GGUF files have for the same places.

A checkpoint of ``DeepseekV3ForCausalLM`` stores each expert and each of a SwiGLU's projections by itself; Benthic
keeps them together for grouped matrix products. So a published name stands for a *place*: a parameter, or one
expert of it, or some rows. Reading copies a tensor into the view of its place, writing takes it from there, and
neither needs to know more.

MTP modules are stored as layers behind the last one (V3 report section 2.2), with copies of the shared embedding
and head: several names may stand for one place.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from benthic.config.schema import ModelConfig

ATTENTION = {"kv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_b": "kv_b_proj", "o": "o_proj"}
FULL_QUERY = {"q": "q_proj"}
COMPRESSED_QUERY = {"q_a": "q_a_proj", "q_norm": "q_a_layernorm", "q_b": "q_b_proj"}
GGUF_ATTENTION = {"kv_a": "attn_kv_a_mqa", "kv_norm": "attn_kv_a_norm", "o": "attn_output"}
GGUF_FULL_QUERY = {"q": "attn_q"}
GGUF_COMPRESSED_QUERY = {"q_a": "attn_q_a", "q_norm": "attn_q_a_norm", "q_b": "attn_q_b"}
MTP = {"embed_norm": "enorm", "hidden_norm": "hnorm", "project": "eh_proj", "norm": "shared_head.norm"}


class Place(NamedTuple):
    """Where the tensor of a published name lives: a parameter, one expert of it, a range of rows."""

    parameter: str
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def view(self, parameters: dict[str, Tensor]) -> Tensor:
        """The place within ``parameters`` (a state dict), sharing its memory."""
        tensor = parameters[self.parameter]
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor if self.rows is None else tensor[..., slice(*self.rows), :]


def published_names(config: ModelConfig) -> dict[str, Place]:
    """Every tensor of a checkpoint of this model, in the order of computation, with its place."""
    return dict(_model(config))


def gguf_names(config: ModelConfig) -> dict[str, Place]:
    """Every tensor of a GGUF file of this model without its MTP modules, in the order of computation, with its place.

    All experts of a layer are one tensor there. ``attn_k_b`` and ``attn_v_b`` are parts of one parameter, ``kv_b``:
    what :func:`split_kv_b` makes of it.
    """
    return dict(_gguf_model(config))


def split_kv_b(kv_b: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """The halves of a latent's expansion as absorbed attention wants them: (H, C, N) for keys, (H, V, C) for values.

    Args:
        kv_b: (H * (N + V), C), a head's N key rows before its V value rows.
        config: of the model.
    """
    split = (config.qk_nope_head_dim, config.v_head_dim)
    key_HNC, value_HVC = kv_b.unflatten(0, (config.num_attention_heads, -1)).split(split, 1)
    return key_HNC.transpose(1, 2), value_HVC


def mtp_prefix(config: ModelConfig, depth: int) -> str:
    """What names of the MTP module of ``depth`` (0 is the first) begin with."""
    return f"model.layers.{config.num_hidden_layers + depth}."


def empty_shared_experts(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Names and shapes of the tensors without elements that transformers keeps for a model without shared experts."""
    if config.n_shared_experts:
        return {}
    shapes = {
        "gate_proj": (0, config.hidden_size),
        "up_proj": (0, config.hidden_size),
        "down_proj": (config.hidden_size, 0),
    }
    layers = range(config.first_k_dense_replace, config.num_hidden_layers + config.num_nextn_predict_layers)
    return {
        f"model.layers.{layer}.mlp.shared_experts.{projection}.weight": shape
        for layer in layers
        for projection, shape in shapes.items()
    }


def _model(config: ModelConfig) -> Iterator[tuple[str, Place]]:
    embed, head = Place("transformer.embed.weight"), Place("transformer.head.weight")
    yield "model.embed_tokens.weight", embed
    for layer in range(config.num_hidden_layers):
        dense = layer < config.first_k_dense_replace
        yield from _block(config, f"transformer.layers.{layer}.", f"model.layers.{layer}.", dense=dense)
    yield "model.norm.weight", Place("transformer.norm.weight")
    yield "lm_head.weight", head
    for depth in range(config.num_nextn_predict_layers):
        theirs = mtp_prefix(config, depth)
        yield f"{theirs}embed_tokens.weight", embed
        yield from _renamed(MTP, f"mtp.{depth}.", theirs)
        yield from _block(config, f"mtp.{depth}.block.", theirs, dense=False)
        yield f"{theirs}shared_head.head.weight", head


def _block(config: ModelConfig, ours: str, theirs: str, *, dense: bool) -> Iterator[tuple[str, Place]]:
    query = FULL_QUERY if config.q_lora_rank is None else COMPRESSED_QUERY
    yield f"{theirs}input_layernorm.weight", Place(f"{ours}attention_norm.weight")
    yield from _renamed(query | ATTENTION, f"{ours}attention.", f"{theirs}self_attn.")
    yield f"{theirs}post_attention_layernorm.weight", Place(f"{ours}ffn_norm.weight")
    if dense:
        yield from _swiglu(f"{ours}ffn.", f"{theirs}mlp.", config.intermediate_size)
    else:
        yield from _experts(config, f"{ours}ffn.", f"{theirs}mlp.")


def _experts(config: ModelConfig, ours: str, theirs: str) -> Iterator[tuple[str, Place]]:
    width = config.moe_intermediate_size
    yield f"{theirs}gate.weight", Place(f"{ours}router.weight")
    yield f"{theirs}gate.e_score_correction_bias", Place(f"{ours}router.bias")
    for expert in range(config.n_routed_experts):
        prefix = f"{theirs}experts.{expert}."
        yield f"{prefix}gate_proj.weight", Place(f"{ours}experts.gate_up", expert, (0, width))
        yield f"{prefix}up_proj.weight", Place(f"{ours}experts.gate_up", expert, (width, 2 * width))
        yield f"{prefix}down_proj.weight", Place(f"{ours}experts.down", expert)
    if config.n_shared_experts:
        yield from _swiglu(f"{ours}shared.", f"{theirs}shared_experts.", width * config.n_shared_experts)


def _swiglu(ours: str, theirs: str, width: int) -> Iterator[tuple[str, Place]]:
    yield f"{theirs}gate_proj.weight", Place(f"{ours}gate_up.weight", rows=(0, width))
    yield f"{theirs}up_proj.weight", Place(f"{ours}gate_up.weight", rows=(width, 2 * width))
    yield f"{theirs}down_proj.weight", Place(f"{ours}down.weight")


def _renamed(names: dict[str, str], ours: str, theirs: str) -> Iterator[tuple[str, Place]]:
    for mine, published in names.items():
        yield f"{theirs}{published}.weight", Place(f"{ours}{mine}.weight")


def _gguf_model(config: ModelConfig) -> Iterator[tuple[str, Place]]:
    yield "token_embd.weight", Place("transformer.embed.weight")
    query = GGUF_FULL_QUERY if config.q_lora_rank is None else GGUF_COMPRESSED_QUERY
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"transformer.layers.{layer}.", f"blk.{layer}."
        yield f"{theirs}attn_norm.weight", Place(f"{ours}attention_norm.weight")
        yield from _renamed(query | GGUF_ATTENTION, f"{ours}attention.", theirs)
        yield f"{theirs}attn_k_b.weight", Place(f"{ours}attention.kv_b.weight")
        yield f"{theirs}attn_v_b.weight", Place(f"{ours}attention.kv_b.weight")
        yield f"{theirs}ffn_norm.weight", Place(f"{ours}ffn_norm.weight")
        if layer < config.first_k_dense_replace:
            yield from _gguf_swiglu(f"{ours}ffn.", theirs, "", config.intermediate_size)
        else:
            yield from _gguf_experts(config, f"{ours}ffn.", theirs)
    yield "output_norm.weight", Place("transformer.norm.weight")
    yield "output.weight", Place("transformer.head.weight")


def _gguf_experts(config: ModelConfig, ours: str, theirs: str) -> Iterator[tuple[str, Place]]:
    width = config.moe_intermediate_size
    yield f"{theirs}ffn_gate_inp.weight", Place(f"{ours}router.weight")
    yield f"{theirs}exp_probs_b.bias", Place(f"{ours}router.bias")
    yield f"{theirs}ffn_gate_exps.weight", Place(f"{ours}experts.gate_up", rows=(0, width))
    yield f"{theirs}ffn_up_exps.weight", Place(f"{ours}experts.gate_up", rows=(width, 2 * width))
    yield f"{theirs}ffn_down_exps.weight", Place(f"{ours}experts.down")
    if config.n_shared_experts:
        yield from _gguf_swiglu(f"{ours}shared.", theirs, "_shexp", width * config.n_shared_experts)


def _gguf_swiglu(ours: str, theirs: str, suffix: str, width: int) -> Iterator[tuple[str, Place]]:
    yield f"{theirs}ffn_gate{suffix}.weight", Place(f"{ours}gate_up.weight", rows=(0, width))
    yield f"{theirs}ffn_up{suffix}.weight", Place(f"{ours}gate_up.weight", rows=(width, 2 * width))
    yield f"{theirs}ffn_down{suffix}.weight", Place(f"{ours}down.weight")
