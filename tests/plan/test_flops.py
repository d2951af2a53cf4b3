"""FLOPs against PyTorch's own counter and the published figure; the cache against the published bytes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benthic.config.presets import PRESETS
from benthic.model import build_model
from benthic.plan.counts import activated, main_model
from benthic.plan.flops import cache_bytes_per_token, forward_flops, training_flops


def test_v3_trains_at_250_gflop_a_token():
    assert training_flops(PRESETS["v3-671b"], 4096) == pytest.approx(250e9, rel=0.005)


def test_causal_and_non_causal_differ_as_the_published_utilisations_do():
    # 38.94% and 43.73% are one step counted both ways (arXiv 2505.09343 table 4).
    config = PRESETS["v3-671b"]
    ratio = training_flops(config, 4096, causal=False) / training_flops(config, 4096)
    assert ratio == pytest.approx(43.73 / 38.94, rel=0.001)


def test_v3_caches_70272_bytes_a_token():
    assert cache_bytes_per_token(PRESETS["v3-671b"]) == 70_272


@pytest.mark.parametrize(("layers", "heads", "length"), [(1, 1, 16), (3, 5, 33)])
def test_forward_flops_against_the_counter_of_pytorch(layers, heads, length):
    # Dense layers and values as wide as keys: every product is one the counter sees, and none is padded. Norms are
    # parameters but no products.
    sizes = {"num_hidden_layers": layers, "first_k_dense_replace": layers, "num_attention_heads": heads}
    config = PRESETS["tiny"].model_copy(update=sizes | {"v_head_dim": PRESETS["tiny"].qk_head_dim})
    model = build_model(config, dtype=torch.float64).transformer  # in plain PyTorch, which is what the counter sees
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, length, dtype=torch.long))
    norms = 2 * activated(main_model(config), config).norms
    assert forward_flops(config, length, causal=False) - norms == counter.get_total_flops() / length


def test_mtp_adds_the_head_once_more():
    config = PRESETS["tiny"]
    without = config.model_copy(update={"num_nextn_predict_layers": 0})
    assert forward_flops(config, 8) == forward_flops(without, 8, mtp=True) == forward_flops(without, 8)
    added = forward_flops(config, 8, mtp=True) - forward_flops(config, 8)
    assert added > 2 * config.vocab_size * config.hidden_size
