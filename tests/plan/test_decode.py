import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.model import build_model
from benthic.plan.decode import decode_bytes


def weights_one_token_reads(config):
    """Counted on the modules: everything, but one row of the embedding and a token's share of the experts."""
    with torch.device("meta"):
        transformer = build_model(config, device="meta").transformer
    total = sum(parameter.numel() for parameter in transformer.parameters())
    routed = sum(p.numel() for name, p in transformer.named_parameters() if ".experts." in name)
    chosen = routed * config.num_experts_per_tok // config.n_routed_experts
    return total - transformer.embed.weight.numel() + config.hidden_size - routed + chosen


@pytest.mark.parametrize("preset", ["tiny", "nano", "bench-108m", "bench-400m", "lite-16b", "v3-671b"])
@pytest.mark.parametrize("bytes_per_number", [2, 4])
def test_one_sequence_reads_its_weights_and_its_cache(preset, bytes_per_number):
    config = PRESETS[preset]
    cache = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    for context in (0, 1, 2048):
        expected = (weights_one_token_reads(config) + context * cache) * bytes_per_number
        assert decode_bytes(config, context, bytes_per_number=bytes_per_number) == pytest.approx(expected, rel=1e-12)


def test_a_batch_reads_the_experts_that_random_routing_chooses():
    config = PRESETS["nano"]
    generator = torch.Generator().manual_seed(0)
    batch, trials = 5, 4000
    choices = torch.rand(trials, batch, config.n_routed_experts, generator=generator).argsort(-1)
    chosen = torch.zeros(trials, config.n_routed_experts)
    chosen.scatter_(1, choices[..., : config.num_experts_per_tok].flatten(1), 1.0)
    layers = config.num_hidden_layers - config.first_k_dense_replace
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    routed = layers * expert * float(chosen.sum(1).mean())
    others = weights_one_token_reads(config) - layers * expert * config.num_experts_per_tok
    rows = (batch - 1) * config.hidden_size
    assert decode_bytes(config, 0, batch, bytes_per_number=1) == pytest.approx(routed + others + rows, rel=0.01)


@pytest.mark.parametrize(
    ("precision", "matrix", "head"), [("fp8", 1, 1), ("int8", 1.0625, 1.0625), ("int4", 0.5625, 1.0625)]
)
def test_matrices_in_fewer_bits(precision, matrix, head):
    config = PRESETS["bench-400m"]
    width, layers, sparse = config.hidden_size, config.num_hidden_layers, config.num_hidden_layers - 1
    norms = layers * (2 * width + config.q_lora_rank + config.kv_lora_rank) + width
    in_head = config.vocab_size * width
    wide = norms + sparse * config.n_routed_experts * width + width
    fewer = weights_one_token_reads(config) - wide - in_head
    expected = fewer * matrix + in_head * head + wide * 4 + 100 * layers * (512 + 64) * 4
    assert decode_bytes(config, 100, precision=precision) == pytest.approx(expected, rel=1e-3)
