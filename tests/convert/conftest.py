"""Odd little models with weights large enough that every part of them moves the logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benthic.config.schema import ModelConfig
from benthic.convert.huggingface import save_hf
from benthic.model import LanguageModel, build_model

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "intermediate_size": 20,
    "num_attention_heads": 3,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "n_routed_experts": 6,
    "moe_intermediate_size": 11,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.7,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 128,
}


@pytest.fixture
def small_config() -> Callable[..., ModelConfig]:
    """A small config, with some sizes changed."""
    return lambda **changes: ModelConfig.model_validate(SIZES | changes)


@pytest.fixture
def random_model() -> Callable[..., LanguageModel]:
    """A model whose every tensor is random, the routers' bias and the norms included."""

    def build(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> LanguageModel:
        model = build_model(config, dtype=dtype).eval()
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
        return model

    return build


@pytest.fixture
def exported(
    small_config: Callable[..., ModelConfig], random_model: Callable[..., LanguageModel], tmp_path: Path
) -> Path:
    """A Hugging Face directory in several shards, without a tokenizer."""
    config = small_config()
    save_hf(random_model(config), config, None, tmp_path / "exported", max_shard_bytes=20_000)
    return tmp_path / "exported"
