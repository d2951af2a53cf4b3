"""GGUF files hold the model's numbers, settings and tokenizer, appear whole or not at all, and say what they cannot."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benthic.config.schema import ModelConfig, YarnConfig
from benthic.convert.gguf import PRECISIONS, export_gguf, precision_named, write_gguf
from benthic.convert.huggingface import save_hf
from benthic.convert.names import gguf_names, split_kv_b
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError, WorkFailed
from benthic.model import LanguageModel

gguf = pytest.importorskip("gguf")

WIDE = {"hidden_size": 64, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "moe_intermediate_size": 32}
LEAST_BITS = {"f32": 0.0, "f16": 2e-3, "bf16": 1e-2, "q8_0": 1e-2, "q4_0": 0.2}
"""Largest error of a stored number, as a share of the tensor's largest."""

FAST = YarnConfig(factor=4.0, original_max_position_embeddings=64, beta_fast=2.0)

SmallConfig = Callable[..., ModelConfig]
RandomModel = Callable[..., LanguageModel]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(["the sea is deep, and 12 fish can't see it", "Ähre  straße\n\n"], 290).save(folder)
    return folder


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and dequantised tensors, by the library's reader."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.dequantize(np.array(t.data), t.tensor_type) for t in reader.tensors}
    return fields, {name: data.reshape(shape_of(reader, name)) for name, data in tensors.items()}


def shape_of(reader: Any, name: str) -> tuple[int, ...]:
    tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
    return tuple(int(size) for size in reversed(tensor.shape))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_file_holds_the_models_numbers(
    small_config: SmallConfig, random_model: RandomModel, tmp_path: Path, precision: Any, seed: int
):
    config = small_config(**WIDE, n_shared_experts=2)
    model = random_model(config, seed)
    written = write_gguf(model, config, None, tmp_path / "m.gguf", precision)
    _, tensors = read(tmp_path / "m.gguf")
    state = model.state_dict()
    assert list(tensors) == list(gguf_names(config))
    assert written.tensors == len(tensors)
    assert written.bytes == (tmp_path / "m.gguf").stat().st_size
    for name, place in gguf_names(config).items():
        expected = place.view(state)
        if "_k_b" in name or "_v_b" in name:
            expected = split_kv_b(expected, config)["_v_b" in name]
        assert tensors[name].shape == tuple(expected.shape), name
        error = np.abs(tensors[name] - expected.numpy()).max() / expected.abs().max().item()
        exact = expected.dim() == 1 or "ffn_gate_inp" in name
        assert error <= (0.0 if exact else LEAST_BITS[precision]), name


def test_rows_that_blocks_do_not_divide_are_fp16_and_the_vocabulary_keeps_eight_bits(
    small_config: SmallConfig, random_model: RandomModel, tmp_path: Path
):
    config = small_config(hidden_size=32, kv_lora_rank=10)
    write_gguf(random_model(config), config, None, tmp_path / "m.gguf", "q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.1.attn_v_b.weight"] == "F16"
    assert kinds["blk.1.attn_q_a.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.1.exp_probs_b.bias"] == "F32"


def test_bf16_weights_stay_what_they_are(small_config: SmallConfig, random_model: RandomModel, tmp_path: Path):
    config = small_config()
    model = random_model(config, dtype=torch.bfloat16)
    write_gguf(model, config, None, tmp_path / "m.gguf", "bf16")
    _, tensors = read(tmp_path / "m.gguf")
    assert np.array_equal(tensors["output.weight"], model.state_dict()["transformer.head.weight"].float().numpy())


def test_settings_are_under_llama_cpps_names(small_config: SmallConfig, random_model: RandomModel, tmp_path: Path):
    yarn = YarnConfig(factor=40.0, original_max_position_embeddings=64)
    config = small_config(
        n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=3, rope_scaling=yarn, rope_theta=5e4
    )
    write_gguf(random_model(config), config, None, tmp_path / "m.gguf", "f32")
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["general.architecture"] == "deepseek2"
    expected = {
        "block_count": 3, "context_length": 128, "embedding_length": 24, "feed_forward_length": 20,
        "leading_dense_block_count": 1, "vocab_size": 61, "attention.head_count": 3, "attention.head_count_kv": 1,
        "attention.q_lora_rank": 12, "attention.kv_lora_rank": 10, "attention.key_length": 14,
        "attention.value_length": 10, "attention.key_length_mla": 9, "attention.value_length_mla": 7,
        "expert_count": 12, "expert_used_count": 3, "expert_shared_count": 1, "expert_feed_forward_length": 11,
        "expert_group_count": 4, "expert_group_used_count": 2, "expert_gating_func": 2, "expert_weights_norm": True,
        "rope.dimension_count": 4, "rope.freq_base": 5e4, "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0,
        "rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.0,
    }  # fmt: skip
    assert {key: fields[f"deepseek2.{key}"] for key in expected} == expected
    assert fields["deepseek2.expert_weights_scale"] == pytest.approx(1.7)
    # As llama.cpp's own converter writes it of V3's config: a tenth of mscale_all_dim.
    assert fields["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)


def test_the_tokenizer_comes_along(
    small_config: SmallConfig, random_model: RandomModel, tokenizer: Path, tmp_path: Path
):
    config = small_config(vocab_size=300)
    write_gguf(random_model(config), config, tokenizer, tmp_path / "m.gguf", "f32")
    fields, _ = read(tmp_path / "m.gguf")
    ours, raw = Tokenizer.load(tokenizer), json.loads((tokenizer / "tokenizer.json").read_text())
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 300
    assert all(tokens[index] == text for text, index in raw["model"]["vocab"].items())
    assert [tokens[i] for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL] == [
        "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>",
    ]  # fmt: skip
    assert types[ours.vocab_size :] == [int(gguf.TokenType.UNUSED)] * (300 - ours.vocab_size)
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.bos_token_id"] == ours.bos_id
    assert fields["tokenizer.ggml.eos_token_id"] == ours.eos_id
    assert fields["tokenizer.ggml.eot_token_id"] == ours.role_ids["user"]
    assert fields["tokenizer.chat_template"] == ours.chat_template
    assert len(fields["tokenizer.ggml.merges"]) == len(raw["model"]["merges"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer"),
        ({"normalizer": {"type": "NFKC"}}, "normalizer"),
        ({"model": {"ignore_merges": True}}, "ignore_merges"),
        ({"model": {"byte_fallback": True}}, "byte_fallback"),
    ],
)
def test_a_tokenizer_that_would_cut_text_otherwise_is_refused(
    small_config: SmallConfig, random_model: RandomModel, tokenizer: Path, tmp_path: Path, change: Any, said: str
):
    folder = tmp_path / "odd"
    shutil.copytree(tokenizer, folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    for key, value in change.items():
        raw[key] = raw[key] | value if key == "model" else value
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    config = small_config(vocab_size=300)
    with pytest.raises(InputError, match=said):
        write_gguf(random_model(config), config, folder, tmp_path / "m.gguf", "f32")
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_shared_experts": 0}, "n_shared_experts=0"),
        ({"n_group": 6, "topk_group": 2}, "n_group=6"),
        ({"num_hidden_layers": 27}, "q_lora_rank=12"),
        ({"rope_scaling": FAST, "qk_rope_head_dim": 16}, "beta_fast=2, beta_slow=1"),
        ({"num_hidden_layers": 26, "first_k_dense_replace": 26}, "q_lora_rank=12"),
    ],
)
def test_models_that_llama_cpp_cannot_run_are_refused(
    small_config: SmallConfig, random_model: RandomModel, tmp_path: Path, changes: dict[str, Any], said: str
):
    config = small_config(**changes)
    with pytest.raises(InputError, match=said):
        write_gguf(random_model(config), config, None, tmp_path / "m.gguf", "f32")


@pytest.mark.parametrize(
    "changes",
    [
        {"n_shared_experts": 0, "first_k_dense_replace": 3},
        {"n_group": 6, "topk_group": 6},
        {"rope_scaling": FAST},
        {"num_hidden_layers": 27, "q_lora_rank": None, "first_k_dense_replace": 26},
    ],
)
def test_models_that_are_near_those_are_not(
    small_config: SmallConfig, random_model: RandomModel, tmp_path: Path, changes: dict[str, Any]
):
    config = small_config(**changes)
    write_gguf(random_model(config), config, None, tmp_path / "m.gguf", "f32")


def test_what_is_left_out_is_told(small_config: SmallConfig, random_model: RandomModel, tmp_path: Path):
    config = small_config(rms_norm_eps=1e-5)
    mtp, eps = write_gguf(random_model(config), config, None, tmp_path / "m.gguf", "f32").remarks
    assert "1 MTP module" in mtp
    assert "1e-05" in eps
    plain = small_config(num_nextn_predict_layers=0)
    assert write_gguf(random_model(plain), plain, None, tmp_path / "plain.gguf", "f32").remarks == []


def test_numbers_too_large_for_fp16_are_refused(small_config: SmallConfig, random_model: RandomModel, tmp_path: Path):
    config = small_config()
    model = random_model(config)
    model.state_dict()["transformer.layers.1.attention.o.weight"][2, 3] = 1e5
    with pytest.raises(InputError, match=r"blk\.1\.attn_output\.weight.*fp16"):
        write_gguf(model, config, None, tmp_path / "m.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_nothing(small_config: SmallConfig, random_model: RandomModel, tmp_path: Path):
    config, out, dangling = small_config(), tmp_path / "m.gguf", tmp_path / "link.gguf"
    write_gguf(random_model(config), config, None, out, "f32")
    before = out.read_bytes()
    dangling.symlink_to(tmp_path / "nothing")
    for there in (out, dangling):
        with pytest.raises(InputError, match=r"already there.*a path that is free"):
            write_gguf(random_model(config, 1), config, None, there, "f32")
    with pytest.raises(InputError, match="is a directory"):
        write_gguf(random_model(config), config, None, tmp_path, "f32")
    assert out.read_bytes() == before


def test_a_unigram_tokenizer_is_refused(
    small_config: SmallConfig, random_model: RandomModel, tokenizer: Path, tmp_path: Path
):
    folder = shutil.copytree(tokenizer, tmp_path / "unigram")
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    raw["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[text, -1.0] for text in vocabulary]}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert Tokenizer.load(folder).vocab_size == len(vocabulary)
    config = small_config(vocab_size=300)
    with pytest.raises(InputError, match=r"model\.type='Unigram'"):
        write_gguf(random_model(config), config, folder, tmp_path / "m.gguf", "f32")


def test_a_failure_leaves_nothing(
    small_config: SmallConfig, random_model: RandomModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config, out = small_config(), tmp_path / "m.gguf"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(WorkFailed, match="No space left"):
        write_gguf(random_model(config, 1), config, None, out, "f32")
    assert list(tmp_path.iterdir()) == []


def test_an_exported_directory_can_be_exported_again(
    small_config: SmallConfig, random_model: RandomModel, tokenizer: Path, tmp_path: Path
):
    config = small_config(vocab_size=300)
    model = random_model(config, dtype=torch.bfloat16)
    save_hf(model, config, tokenizer, tmp_path / "hf")
    assert export_gguf(tmp_path / "hf", tmp_path / "m.gguf").precision == "bf16"
    assert export_gguf(tmp_path / "hf", tmp_path / "f32.gguf", "f32").precision == "f32"


def test_precisions_have_names():
    assert precision_named(None) is None
    assert precision_named("q8_0") == "q8_0"
    with pytest.raises(InputError, match="f32, f16, bf16, q8_0, q4_0"):
        precision_named("fp4")
