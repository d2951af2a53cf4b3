"""Formulas of parameters against the modules themselves and against what DeepSeek published."""

import random

import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.config.schema import ModelConfig
from benthic.model import build_model
from benthic.plan.counts import activated, main_model, mtp_modules


def random_config(seed: int) -> ModelConfig:
    pick = random.Random(seed)
    groups, layers = pick.choice([1, 2, 3]), pick.randint(1, 5)
    experts = groups * pick.randint(2, 4)
    return ModelConfig(
        vocab_size=pick.randint(11, 99), hidden_size=pick.randint(3, 40), num_hidden_layers=layers,
        first_k_dense_replace=pick.randint(0, layers), intermediate_size=pick.randint(5, 50),
        num_attention_heads=pick.randint(1, 5), q_lora_rank=pick.choice([None, 7, 12]), kv_lora_rank=pick.randint(3, 9),
        qk_nope_head_dim=pick.randint(1, 9), qk_rope_head_dim=2 * pick.randint(1, 4), v_head_dim=pick.randint(1, 9),
        n_routed_experts=experts, moe_intermediate_size=pick.randint(3, 17), n_shared_experts=pick.randint(0, 2),
        num_experts_per_tok=pick.randint(1, 2), n_group=groups, num_nextn_predict_layers=pick.randint(0, 2),
    )  # fmt: skip


def built_parts(config: ModelConfig, prefix: str) -> dict[str, int]:
    """Parameters of the real modules by part, told apart by their names alone."""
    parts: dict[str, int] = {}
    with torch.device("meta"):
        parameters = dict(build_model(config, device="meta").named_parameters())
    for name, parameter in parameters.items():
        if name.startswith(prefix):
            part = part_of(name)
            parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def part_of(name: str) -> str:
    known = {"embed.": "embedding", "head.": "head", "norm.": "norms", "project.": "projection", "experts.":
             "routed_experts", "shared.": "shared_experts", "router.": "router", "attention.": "attention"}  # fmt: skip
    return next((part for piece, part in known.items() if piece in name), "dense_ffn")


@pytest.mark.parametrize("seed", range(12))
def test_formulas_equal_the_modules_part_by_part(seed):
    config = random_config(seed)
    for counts, prefix in ((main_model(config), "transformer."), (mtp_modules(config), "mtp.")):
        counted = {part: number for part, number in vars(counts).items() if number}
        assert counted == built_parts(config, prefix)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_on_the_meta_device_with_the_counted_size(preset):
    config = PRESETS[preset]
    model = build_model(config, device="meta")
    assert sum(p.numel() for p in model.transformer.parameters()) == main_model(config).total
    assert sum(p.numel() for p in model.mtp.parameters()) == mtp_modules(config).total


@pytest.mark.parametrize(("preset", "total", "active"), [
    ("v3-671b", 671.03e9, 37.55e9), ("bench-108m", 108.1e6, 31.06e6), ("bench-400m", 422.3e6, 114.0e6),
])  # fmt: skip
def test_published_sizes(preset, total, active):
    counts = main_model(PRESETS[preset])
    assert counts.total == pytest.approx(total, rel=5e-4)
    assert activated(counts, PRESETS[preset]).total == pytest.approx(active, rel=5e-4)


def test_published_mtp_size_of_v3():
    config = PRESETS["v3-671b"]
    mtp, main = mtp_modules(config), main_model(config)
    assert mtp.total == pytest.approx(11.61e9, rel=5e-4)
    assert activated(mtp, config).total + main.embedding + main.head == pytest.approx(2.54e9, rel=1e-3)
