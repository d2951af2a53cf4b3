"""What a GGUF file says of a model beside its weights, and which models llama.cpp's ``deepseek2`` cannot run.

llama.cpp takes several things from the number of layers, or has no setting for them. A model that it would load and
answer wrongly, or that would end its process, is refused here.
"""

import math
from typing import TYPE_CHECKING

from benthic.config.schema import ModelConfig, YarnConfig
from benthic.errors import InputError
from benthic.ops.rope import cosine_factor, ramp_bounds, softmax_scale

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURE = "deepseek2"
_LITE_LAYERS = (26, 27)
_LITE_LAYERS_AND_VOCABULARY = (48, 128256)
"""Sizes of models without ``q_lora_rank``; where it finds them, llama.cpp does not look for the setting."""
_USUAL_EPS = 1e-6
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""llama.cpp does not read others for this architecture."""


def check_supported(config: ModelConfig) -> None:
    """Raises InputError if llama.cpp cannot run such a model."""
    sparse = config.first_k_dense_replace < config.num_hidden_layers
    if sparse and not config.n_shared_experts:
        raise InputError("model.n_shared_experts=0: llama.cpp asks for a shared expert; export with --format hf")
    if sparse and groups(config) == config.n_routed_experts > 1:
        raise InputError(
            f"model.n_group={config.n_group}: llama.cpp's groups have at least two experts; export with --format hf"
        )
    layers = config.num_hidden_layers
    lite = layers in _LITE_LAYERS or (layers, config.vocab_size) == _LITE_LAYERS_AND_VOCABULARY
    if config.q_lora_rank is not None and lite:
        raise InputError(
            f"model.q_lora_rank={config.q_lora_rank}: llama.cpp takes models of {layers} layers for ones without it; "
            "export with --format hf"
        )
    yarn = config.rope_scaling
    if yarn is not None:
        usual = yarn.model_copy(update=_BETAS)
        theta, width = config.rope_theta, config.qk_rope_head_dim
        if ramp_bounds(theta, width, yarn) != ramp_bounds(theta, width, usual):
            raise InputError(
                f"model.rope_scaling: beta_fast={yarn.beta_fast:g}, beta_slow={yarn.beta_slow:g}: llama.cpp computes "
                "with 32 and 1; export with --format hf"
            )


def remarks(config: ModelConfig) -> list[str]:
    """What llama.cpp will do otherwise than Benthic, in lines for the user."""
    found = []
    if config.num_nextn_predict_layers:
        found.append(f"left out: {config.num_nextn_predict_layers} MTP module(s), which llama.cpp does not run")
    if config.rms_norm_eps != _USUAL_EPS:
        found.append(
            f"llama.cpp normalises the latents, too, with rms_norm_eps={config.rms_norm_eps:g}, the published code "
            "with 1e-06: logits differ a little"
        )
    return found


def groups(config: ModelConfig) -> int:
    """Groups that limit the choice of experts; 1 where all may be chosen, since llama.cpp refuses to be told so."""
    return config.n_group if config.topk_group < config.n_group else 1


def add_model_settings(writer: "GGUFWriter", config: ModelConfig) -> None:
    """Sizes and constants under the names of llama.cpp's ``deepseek2``, which computes MLA in its absorbed form."""
    from gguf import ExpertGatingFuncType

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_leading_dense_block_count(min(config.first_k_dense_replace, config.num_hidden_layers))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)  # absorbed, all heads read one latent
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.latent_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    if groups(config) > 1:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None:
        _add_yarn(writer, config, config.rope_scaling)


def _add_yarn(writer: "GGUFWriter", config: ModelConfig, yarn: YarnConfig) -> None:
    """YaRN, with the two numbers that give our temperatures in llama.cpp's arithmetic.

    It multiplies cosines by ``attn_factor`` and scores by (``attn_factor`` (1 + m ln ``factor``))^2, m being
    ``yarn_log_multiplier``.
    """
    from gguf import RopeScalingType

    cosines = cosine_factor(yarn)
    scores = math.sqrt(softmax_scale(config) * math.sqrt(config.qk_head_dim))
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(yarn.factor)
    writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
    writer.add_rope_scaling_attn_factors(cosines)
    if yarn.factor > 1:
        writer.add_rope_scaling_yarn_log_mul((scores / cosines - 1) / math.log(yarn.factor))
