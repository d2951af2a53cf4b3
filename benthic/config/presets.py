"""Named model sizes, from one for unit tests to DeepSeek-V3 itself."""

from benthic.config.schema import ModelConfig, YarnConfig

# fmt: off
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=3, intermediate_size=128, num_attention_heads=4,
        q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        n_routed_experts=8, moe_intermediate_size=32, num_experts_per_tok=2, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, num_nextn_predict_layers=1, max_position_embeddings=256, initializer_range=0.02,
    ),
    "nano": ModelConfig(
        vocab_size=4096, hidden_size=192, num_hidden_layers=4, intermediate_size=576, num_attention_heads=4,
        q_lora_rank=96, kv_lora_rank=48, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
        n_routed_experts=16, moe_intermediate_size=96, num_experts_per_tok=4, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, num_nextn_predict_layers=1, max_position_embeddings=512, initializer_range=0.02,
    ),
    "bench-108m": ModelConfig(
        vocab_size=8192, hidden_size=512, num_hidden_layers=8, intermediate_size=1536, num_attention_heads=8,
        q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        n_routed_experts=32, moe_intermediate_size=256, num_experts_per_tok=4, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, initializer_range=0.02,
    ),
    "bench-400m": ModelConfig(
        vocab_size=8192, hidden_size=1024, num_hidden_layers=8, intermediate_size=4096, num_attention_heads=8,
        q_lora_rank=384, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        n_routed_experts=32, moe_intermediate_size=512, num_experts_per_tok=4, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, initializer_range=0.02,
    ),
    "lite-16b": ModelConfig(
        vocab_size=163840, hidden_size=2048, num_hidden_layers=27, intermediate_size=11264, num_attention_heads=16,
        q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        n_routed_experts=64, moe_intermediate_size=1408, n_shared_experts=2, num_experts_per_tok=6,
        routed_scaling_factor=2.446, max_position_embeddings=8192, rope_theta=50000.0, rms_norm_eps=1e-5,
        initializer_range=0.02,
    ),
    "v3-671b": ModelConfig(
        vocab_size=129280, hidden_size=7168, num_hidden_layers=61, first_k_dense_replace=3, intermediate_size=18432,
        num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, n_routed_experts=256, moe_intermediate_size=2048, num_experts_per_tok=8, n_group=8,
        topk_group=4, routed_scaling_factor=2.5, num_nextn_predict_layers=1, max_position_embeddings=163840,
        rope_scaling=YarnConfig(factor=40.0, original_max_position_embeddings=4096),
    ),
}
# fmt: on
