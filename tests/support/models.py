"""Models of odd sizes, and the simplest cache there can be."""

import random

import torch

from benthic.config.schema import ModelConfig, YarnConfig


def odd_config(seed, **changes):
    """Sizes that share no factor by design; every third has no query compression, every other one YaRN."""
    rng = random.Random(seed)
    groups = rng.choice([1, 2, 4])
    sizes = {
        "vocab_size": rng.randint(30, 60), "hidden_size": rng.randint(9, 90), "num_hidden_layers": rng.randint(1, 3),
        "first_k_dense_replace": rng.randint(0, 1), "intermediate_size": rng.randint(5, 70),
        "num_attention_heads": rng.choice([1, 2, 3, 5, 8, 9, 11]),
        "q_lora_rank": None if seed % 3 == 0 else rng.randint(5, 40), "kv_lora_rank": rng.randint(3, 75),
        "qk_nope_head_dim": rng.randint(2, 35), "qk_rope_head_dim": 2 * rng.randint(1, 9),
        "v_head_dim": rng.randint(2, 35), "n_routed_experts": groups * rng.randint(2, 5),
        "moe_intermediate_size": rng.randint(3, 40), "n_shared_experts": rng.randint(0, 2), "num_experts_per_tok": 2,
        "n_group": groups, "topk_group": rng.randint(1, groups), "norm_topk_prob": rng.random() < 0.7,
        "routed_scaling_factor": 1.7, "max_position_embeddings": 4096, "initializer_range": 0.2,
        "rope_scaling": YarnConfig(factor=4.0, original_max_position_embeddings=16) if seed % 2 else None,
    }  # fmt: skip
    return ModelConfig(**sizes | changes)


class SequenceLatents:
    """One sequence's latents (S, L) of every layer, in the form ``Transformer.hidden`` reads and appends to."""

    def __init__(self, latents_NSL, kept=None):
        self.latents_NSL, self.length, self.kept = list(latents_NSL), latents_NSL[0].shape[0], kept

    @classmethod
    def empty(cls, config):
        """No tokens yet."""
        return cls(torch.empty(config.num_hidden_layers, 0, config.latent_dim))

    def append(self, layer, latent_BTL):
        new_TL = self.kept(layer, latent_BTL[0]) if self.kept else latent_BTL[0]
        self.latents_NSL[layer] = torch.cat((self.latents_NSL[layer][: self.length], new_TL))
        return self.latents_NSL[layer][None]
