import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.errors import InputError
from benthic.lab import bench_inference
from benthic.lab.bench_inference import bench_decode, bench_prefill
from benthic.model import build_model
from benthic.ops import native
from benthic.plan.decode import decode_bytes

KEYS = {"tokens_per_s", "context", "batch", "precision", "cache_precision", "memory_gb_per_s", "gemm_gflops",
        "share_of_limit", "accepted_per_step", "kernels"}  # fmt: skip


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(bench_inference, "measure_bandwidth_gb_s", lambda: 10.0)
    monkeypatch.setattr(bench_inference, "measure_gemm_gflops", lambda *of: 100.0)


@pytest.mark.parametrize("bench", [bench_prefill, bench_decode])
@pytest.mark.parametrize(("batch", "precision"), [(1, "fp32"), (3, "bf16")])
def test_has_the_promised_keys(bench, batch, precision):
    speed = vars(bench(PRESETS["tiny"], context=9, batch=batch, precision=precision))
    assert set(speed) == KEYS
    assert (speed["context"], speed["batch"], speed["precision"]) == (9, batch, precision)
    assert speed["cache_precision"] == precision
    assert speed["tokens_per_s"] > 0
    assert speed["share_of_limit"] > 0


def test_share_of_limit_follows_from_speed_and_traffic(monkeypatch):
    monkeypatch.setattr(bench_inference, "_median_seconds", lambda work: 0.5)
    config = PRESETS["nano"]
    speed = bench_decode(config, context=100, batch=2)
    seconds_a_step = 0.5 / 16
    assert speed.tokens_per_s == pytest.approx(2 / seconds_a_step)
    assert speed.share_of_limit == pytest.approx(decode_bytes(config, 100, 2) / 10e9 / seconds_a_step)


def test_prefill_is_charged_one_row_of_logits(monkeypatch):
    monkeypatch.setattr(bench_inference, "_median_seconds", lambda work: 0.5)
    wide, narrow = (PRESETS["nano"].model_copy(update={"vocab_size": size}) for size in (1000, 400))
    rows = [bench_prefill(config, context=64, batch=2).share_of_limit * 0.5 * 100e9 for config in (wide, narrow)]
    assert rows[0] - rows[1] == pytest.approx(2 * 2 * 600 * wide.hidden_size)


@pytest.mark.parametrize("bench", [bench_prefill, bench_decode])
@pytest.mark.parametrize(
    ("context", "batch", "words"), [(-1, 1, "context=-1"), (256, 1, "context=256"), (5, 0, "batch=0")]
)
def test_wrong_sizes_are_refused(bench, context, batch, words):
    with pytest.raises(InputError, match=words):
        bench(PRESETS["tiny"], context=context, batch=batch)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
def test_decodes_with_weights_in_fewer_bits(precision, there, monkeypatch):
    if not there:
        monkeypatch.setattr(native, "decode_library", lambda: (None, "PyTorch decoding (a reason)"))
    monkeypatch.setattr(bench_inference, "_median_seconds", lambda work: work() or 0.5)
    config = PRESETS["nano"]
    speed = bench_decode(config, context=100, precision=precision)
    assert speed.precision == precision
    assert speed.share_of_limit == pytest.approx(decode_bytes(config, 100, precision=precision) / 10e9 / (0.5 / 16))


@pytest.mark.parametrize("kept", ["bf16", "fp8"])
def test_decodes_over_a_cache_in_fewer_bits(kept, monkeypatch):
    monkeypatch.setattr(bench_inference, "_median_seconds", lambda work: work() or 0.5)
    config = PRESETS["nano"]
    speed = bench_decode(config, context=100, cache_precision=kept)
    assert speed.cache_precision == kept
    saved = decode_bytes(config, 100) - decode_bytes(config, 100, cache_precision=kept)
    row = config.kv_lora_rank + config.qk_rope_head_dim
    bytes_a_row = {"bf16": 2 * row, "fp8": config.kv_lora_rank + 4 + 2 * config.qk_rope_head_dim}[kept]
    assert saved == 100 * config.num_hidden_layers * (4 * row - bytes_a_row)
    assert speed.share_of_limit == pytest.approx(decode_bytes(config, 100, cache_precision=kept) / 10e9 / (0.5 / 16))


@torch.inference_mode()
def test_a_prompt_is_read_in_the_engines_chunks_and_right(monkeypatch):
    config = PRESETS["tiny"].model_copy(update={"max_position_embeddings": 512, "initializer_range": 0.3})
    model, chunks = build_model(config, seed=1), []
    read_chunk = bench_inference.read_chunk

    def noting(transformer, cache, table_P, start, ids):
        chunks.append((start, len(ids)))
        return read_chunk(transformer, cache, table_P, start, ids)

    monkeypatch.setattr(bench_inference, "read_chunk", noting)
    read = bench_inference.prompt_reader(model, 150)
    for length in (150, 64):
        ids = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        assert int(read(ids)) == int(model(torch.tensor([ids]))[0, -1].argmax())
    assert chunks == [(0, 64), (64, 64), (128, 22), (0, 64)]


def test_says_what_multiplies_when_prompts_are_read(monkeypatch):
    said = bench_prefill(PRESETS["tiny"], context=9).kernels
    assert ("tiles" in said) == native.has_tiles()
    assert ("vector units" in said) == (native.has_fast_vectors() and not native.has_tiles())
    assert "tiles" not in bench_prefill(PRESETS["tiny"], context=9, precision="bf16").kernels
    monkeypatch.setenv("BENTHIC_NATIVE", "blas")
    assert bench_prefill(PRESETS["tiny"], context=9).kernels == native.status()


def test_only_a_prompt_needs_tokens():
    assert bench_decode(PRESETS["tiny"], context=0).context == 0
    with pytest.raises(InputError, match="context=0: must be from 1"):
        bench_prefill(PRESETS["tiny"], context=0)


@pytest.mark.parametrize("there", [True, False])
def test_decoding_falls_back_on_pytorch_and_says_so(there, monkeypatch):
    if not there:
        monkeypatch.setattr(native, "decode_library", lambda: (None, "PyTorch decoding (a reason)"))
    elif native.decode_library()[0] is None:
        pytest.skip("no native decoding here")
    kernels = bench_decode(PRESETS["tiny"], context=70, batch=2).kernels
    assert kernels.startswith("native decoding") if there else kernels == "PyTorch decoding (a reason)"
