"""GGUF names are those of the gguf library's own table, for every tensor of every kind of model."""

import re
from collections.abc import Callable

import pytest
import torch

from benthic.config.schema import ModelConfig
from benthic.convert.names import gguf_names, published_names, split_kv_b
from benthic.model import LanguageModel, build_model

gguf = pytest.importorskip("gguf")

KINDS = [
    {},
    {"q_lora_rank": None, "num_nextn_predict_layers": 2},
    {"n_shared_experts": 2, "first_k_dense_replace": 2},
    {"first_k_dense_replace": 0},
    {"first_k_dense_replace": 3},
]
each_kind = pytest.mark.parametrize("changes", KINDS, ids=str)


@each_kind
def test_names_are_the_librarys_for_the_published_ones(small_config: Callable[..., ModelConfig], changes: dict):
    config = small_config(**changes)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config.num_hidden_layers)
    expected = set()
    for name in published_names(config):
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            continue  # of MTP modules
        merged = re.sub(r"experts\.\d+\.", "experts.", name).replace(
            "gate.e_score_correction_bias", "gate.e_score_correction.bias"
        )
        halves = [merged.replace("kv_b_proj", half) for half in ("k_b_proj", "v_b_proj")]
        expected |= {table.get_name(one, try_suffixes=(".weight", ".bias")) for one in halves}
    assert None not in expected
    assert set(gguf_names(config)) == expected


@each_kind
def test_every_weight_but_those_of_mtp_modules_is_there_once(small_config: Callable[..., ModelConfig], changes: dict):
    config = small_config(**changes)
    state = build_model(config, device="meta").state_dict()
    held = sum(
        (
            split_kv_b(place.view(state), config)[0 if "k_b" in name else 1]
            if re.search("attn_[kv]_b", name)
            else place.view(state)
        ).numel()
        for name, place in gguf_names(config).items()
    )
    assert held == sum(tensor.numel() for name, tensor in state.items() if not name.startswith("mtp."))


def test_halves_of_the_latents_expansion_do_what_the_whole_does(
    small_config: Callable[..., ModelConfig], random_model: Callable[..., LanguageModel]
):
    config = small_config()
    weight = random_model(config).state_dict()["transformer.layers.1.attention.kv_b.weight"]
    latent = torch.randn(config.kv_lora_rank)
    key_HCN, value_HVC = split_kv_b(weight, config)
    heads = (weight @ latent).unflatten(0, (config.num_attention_heads, -1))
    both = torch.cat((latent @ key_HCN, value_HVC @ latent), 1)
    torch.testing.assert_close(both, heads)
