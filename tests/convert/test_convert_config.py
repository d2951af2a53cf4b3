"""config.json in both styles, as published; what is another architecture is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.config.schema import ModelConfig, YarnConfig
from benthic.convert.config import config_from_hf, config_to_hf, is_fp8, stored_dtype
from benthic.errors import InputError

SOURCE = Path("some/config.json")

# What the config.json of the DeepSeek-V3 release says, in its own words.
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 129280,
}  # fmt: skip


def test_the_published_config_is_the_preset() -> None:
    config = config_from_hf(DEEPSEEK_V3, SOURCE)
    assert config == PRESETS["v3-671b"].model_copy(update={"initializer_range": 0.02})
    assert is_fp8(DEEPSEEK_V3, SOURCE)
    assert stored_dtype(DEEPSEEK_V3, SOURCE) == torch.bfloat16


def test_what_is_written_has_every_published_key_with_its_value() -> None:
    preset = PRESETS["v3-671b"].model_copy(update={"initializer_range": 0.02})
    written = config_to_hf(preset, torch.bfloat16, {"bos_token_id": 0, "eos_token_id": 1})
    of_files = {"quantization_config", "ep_size"}
    assert {key: written.get(key) for key in DEEPSEEK_V3.keys() - of_files} == {
        key: value for key, value in DEEPSEEK_V3.items() if key not in of_files
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_the_round_trip_through_json(preset: str) -> None:
    raw = json.loads(json.dumps(config_to_hf(PRESETS[preset], torch.float32, {})))
    assert config_from_hf(raw, SOURCE) == PRESETS[preset]
    assert not is_fp8(raw, SOURCE)


def test_rotary_settings_are_read_in_the_newer_style() -> None:
    raw = {key: value for key, value in DEEPSEEK_V3.items() if key not in ("rope_scaling", "rope_theta")}
    yarn = DEEPSEEK_V3["rope_scaling"]
    raw["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 50000.0} | yarn
    config = config_from_hf(raw, SOURCE)
    assert config.rope_theta == 50000.0
    assert config.rope_scaling == YarnConfig(factor=40.0, original_max_position_embeddings=4096)
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 700.0}
    config = config_from_hf(raw, SOURCE)
    assert (config.rope_theta, config.rope_scaling) == (700.0, None)


def test_yarn_without_temperatures_means_what_deepseek_code_makes_of_it() -> None:
    rope = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    config = config_from_hf(DEEPSEEK_V3 | {"rope_scaling": rope}, SOURCE)
    assert config.rope_scaling is not None
    assert (config.rope_scaling.mscale, config.rope_scaling.mscale_all_dim) == (1.0, 0.0)


@pytest.mark.parametrize("change", [
    {"model_type": "kimi_k2", "num_nextn_predict_layers": None}, {"n_shared_experts": None}, {"q_lora_rank": None},
    {"num_key_value_heads": None}, {"some_new_key": [1, 2]},
], ids=str)  # fmt: skip
def test_relatives_are_accepted(change: dict[str, Any]) -> None:
    config = config_from_hf(DEEPSEEK_V3 | change, SOURCE)
    for key, value in change.items():
        if key in ModelConfig.model_fields:
            assert getattr(config, key) == (value if key == "q_lora_rank" else 0)


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "deepseek_v2"}, r'model_type = "deepseek_v2": must be "deepseek_v3" or "kimi_k2"'),
    ({"architectures": ["LlamaForCausalLM"]}, r'architectures = \["LlamaForCausalLM"\]: must be'),
    ({"hidden_act": "gelu"}, 'hidden_act = "gelu": must be "silu"'),
    ({"attention_bias": True}, "attention_bias = true: must be false"),
    ({"rope_interleave": False}, "rope_interleave = false: must be true"),
    ({"scoring_func": "softmax"}, 'scoring_func = "softmax": must be "sigmoid"'),
    ({"topk_method": "greedy"}, 'topk_method = "greedy": must be "noaux_tc"'),
    ({"moe_layer_freq": 2}, "moe_layer_freq = 2: must be 1"),
    ({"num_key_value_heads": 8}, "num_key_value_heads = 8: must be 128"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, 'rope_scaling.type = "linear": must be "yarn"'),
    ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling.original_max_position_embeddings: missing"),
    ({"rope_scaling": {"type": "yarn", "mscale": 1.0}}, "mscale and mscale_all_dim must be given together"),
    ({"rope_scaling": {"type": "yarn", "attention_factor": 2}}, "rope_scaling.attention_factor = 2: allowed are"),
    ({"rope_scaling": [1]}, r"rope_scaling = \[1\]: must be an object"),
    ({"hidden_size": "7168"}, 'hidden_size = "7168": must'),
    ({"n_group": 7}, "n_group=7 must divide n_routed_experts=256"),
    ({"kv_lora_rank": -1}, "kv_lora_rank = -1: must be greater than 0"),
], ids=str)  # fmt: skip
def test_another_architecture_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        config_from_hf(DEEPSEEK_V3 | change, SOURCE)
    assert str(caught.value).startswith(str(SOURCE))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "n_group", "norm_topk_prob", "routed_scaling_factor", "rms_norm_eps"])
def test_a_size_that_is_missing_is_not_guessed(key: str) -> None:
    with pytest.raises(InputError, match=f"{key} is missing"):
        config_from_hf({name: value for name, value in DEEPSEEK_V3.items() if name != key}, SOURCE)


@pytest.mark.parametrize(("quantisation", "message"), [
    ({"quant_method": "gptq", "bits": 4}, 'quantization_config.quant_method = "gptq": must be "fp8"'),
    ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size = \[64, 64\]: must be \[128, 128\]"),
    ({"quant_method": "fp8"}, r"weight_block_size = null: must be \[128, 128\]"),
    ({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}, 'fmt = "e5m2": must be "e4m3"'),
    ("fp8", 'quantization_config = "fp8": must be an object'),
], ids=str)  # fmt: skip
def test_other_quantisations_are_refused(quantisation: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        is_fp8({"quantization_config": quantisation}, SOURCE)


def test_an_unknown_dtype_is_refused(small_config: Callable[..., ModelConfig]) -> None:
    raw = config_to_hf(small_config(), torch.float32, {}) | {"torch_dtype": "int4"}
    with pytest.raises(InputError, match='dtype = "int4": must be one of float32'):
        stored_dtype(raw, SOURCE)
