"""Directories written and read back: bitwise, sharded, whole or absent."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benthic.config.schema import ModelConfig
from benthic.convert import huggingface, shards
from benthic.convert.huggingface import load_hf, save_hf
from benthic.convert.names import published_names
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError, WorkFailed
from benthic.model import LanguageModel, build_model

SmallConfig = Callable[..., ModelConfig]
RandomModel = Callable[..., LanguageModel]

CONFIGS: list[dict[str, Any]] = [
    {}, {"num_nextn_predict_layers": 0}, {"num_nextn_predict_layers": 2, "q_lora_rank": None, "n_shared_experts": 0},
    {"n_shared_experts": 2, "first_k_dense_replace": 0},
]  # fmt: skip


def assert_same_weights(model: LanguageModel, other: LanguageModel) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weights_come_back_bit_for_bit(
    changes: dict[str, Any], dtype: torch.dtype, small_config: SmallConfig, random_model: RandomModel, tmp_path: Path
) -> None:
    config = small_config(**changes)
    model = random_model(config, dtype=dtype)
    save_hf(model, config, None, tmp_path / "out", max_shard_bytes=9_000)
    loaded, found = load_hf(tmp_path / "out")
    assert found == config
    assert_same_weights(model, loaded)


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_the_table_covers_every_number_of_the_model_once(changes: dict[str, Any], small_config: SmallConfig) -> None:
    config = small_config(**changes)
    state = build_model(config).state_dict()
    places = set(published_names(config).values())
    for tensor in state.values():
        tensor.zero_()
    for place in places:
        view = place.view(state)
        view += 1
    assert all((tensor == 1).all() for tensor in state.values())


def test_names_are_those_of_the_published_checkpoints(small_config: SmallConfig) -> None:
    names = published_names(small_config())
    assert {name.removeprefix("model.layers.3.") for name in names if name.startswith("model.layers.3.")} >= {
        "embed_tokens.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight",
        "shared_head.head.weight", "input_layernorm.weight", "post_attention_layernorm.weight",
        "self_attn.kv_a_proj_with_mqa.weight", "mlp.gate.e_score_correction_bias", "mlp.experts.5.down_proj.weight",
        "mlp.shared_experts.up_proj.weight",
    }  # fmt: skip


def test_shards_are_bounded_and_indexed(exported: Path) -> None:
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    files = sorted(exported.glob("*.safetensors"))
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    weights = {file.name: load_file(file) for file in files}
    total = sum(tensor.nbytes for shard in weights.values() for tensor in shard.values())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"] == {name: file for file, shard in weights.items() for name in shard}
    assert all(sum(tensor.nbytes for tensor in shard.values()) <= 20_000 for shard in weights.values())


@pytest.mark.parametrize(("sizes", "expected"), [
    ({"a": 4, "b": 4, "c": 4}, [["a", "b"], ["c"]]),
    ({"a": 20, "b": 4, "c": 20}, [["a"], ["b"], ["c"]]),
    ({"a": 8, "b": 0, "c": 1}, [["a", "b"], ["c"]]),
])  # fmt: skip
def test_shards_are_filled_in_order(sizes: dict[str, int], expected: list[list[str]]) -> None:
    assert shards.plan_shards(sizes, 8) == expected


def test_export_in_another_dtype_keeps_the_bias_of_routers(
    small_config: SmallConfig, random_model: RandomModel, tmp_path: Path
) -> None:
    config = small_config()
    model = random_model(config)
    save_hf(model, config, None, tmp_path / "out", dtype=torch.bfloat16)
    loaded, _ = load_hf(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, tensor in loaded.state_dict().items():
        expected = model.state_dict()[name]
        assert torch.equal(tensor, expected if name.endswith("router.bias") else expected.bfloat16())
    in_fp32, _ = load_hf(tmp_path / "out", dtype=torch.float32)
    assert {tensor.dtype for tensor in in_fp32.state_dict().values()} == {torch.float32}


def test_tokenizer_travels_with_the_model(small_config: SmallConfig, random_model: RandomModel, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["some text to learn from, some more text"], vocab_size=280)
    tokenizer.save(tmp_path / "tokenizer")
    config = small_config(vocab_size=tokenizer.vocab_size)
    save_hf(random_model(config), config, tmp_path / "tokenizer", tmp_path / "out")
    assert Tokenizer.load(tmp_path / "out").fingerprint == tokenizer.fingerprint
    for file in ("config.json", "generation_config.json"):
        ids = json.loads((tmp_path / "out" / file).read_text())
        assert ids["bos_token_id"] == tokenizer.bos_id
        assert ids["eos_token_id"][0] == tokenizer.eos_id
        assert set(ids["eos_token_id"]) == tokenizer.stop_ids


def test_an_earlier_export_is_replaced(exported: Path, small_config: SmallConfig, random_model: RandomModel) -> None:
    config = small_config(num_hidden_layers=2)
    model = random_model(config, seed=9)
    save_hf(model, config, None, exported)
    loaded, found = load_hf(exported)
    assert found == config
    assert_same_weights(model, loaded)
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]
    assert len(list(exported.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("there", ["a file", "other files", "a model from elsewhere", "an export and more"])
def test_anything_else_is_not_overwritten(
    there: str, exported: Path, small_config: SmallConfig, random_model: RandomModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if there == "a file":
        out.write_text("precious")
    elif there == "other files":
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
    elif there == "an export and more":
        exported.rename(out)
        (out / "notes.txt").write_text("precious")
    else:
        exported.rename(out)
        index = out / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    config = small_config()
    with pytest.raises(InputError, match="out: already there"):
        save_hf(random_model(config), config, None, out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_export_that_fails_half_way_leaves_the_earlier_one(
    exported: Path, small_config: SmallConfig, random_model: RandomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in exported.parent.rglob("*") if path.is_file()}
    written = []

    def full_disk(tensors: Any, file: Path, **options: Any) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(file)
        save_file(tensors, file, **options)

    monkeypatch.setattr(shards, "save_file", full_disk)
    config = small_config()
    with pytest.raises(WorkFailed, match=r"exported: cannot be written: .*No space left"):
        save_hf(random_model(config, seed=2), config, None, exported, max_shard_bytes=9_000)
    assert len(written) == 2
    assert {path: path.read_bytes() for path in exported.parent.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_may_not_be_written_is_the_users_mistake(
    small_config: SmallConfig, random_model: RandomModel, tmp_path: Path
) -> None:
    config = small_config()
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="out: cannot be written"):
        save_hf(random_model(config), config, None, tmp_path / "out")


def test_a_file_in_the_way_is_the_users_mistake(
    small_config: SmallConfig, random_model: RandomModel, tmp_path: Path
) -> None:
    config = small_config()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="out: cannot be written"):
        save_hf(random_model(config), config, None, tmp_path / "file" / "out")


def test_a_tokenizer_that_cannot_be_read_is_named(
    small_config: SmallConfig, random_model: RandomModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.train(["some text to learn from"], vocab_size=280)
    tokenizer.save(tmp_path / "tokenizer")
    config, source, read = small_config(vocab_size=300), tmp_path / "tokenizer" / "tokenizer.json", Path.read_bytes

    def broken_disk(path: Path) -> bytes:
        if path == source:
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", broken_disk)
    monkeypatch.setattr(huggingface, "tokenizer_ids", lambda folder: {})
    with pytest.raises(InputError, match=rf"{source}: cannot be read"):
        save_hf(random_model(config), config, tmp_path / "tokenizer", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_embeddings_become_two_equal_weights(exported: Path) -> None:
    rewrite(exported, lambda tensors: {name: t for name, t in tensors.items() if not name.endswith("head.weight")})
    change_config(exported, tie_word_embeddings=True)
    model, _ = load_hf(exported)
    assert torch.equal(model.transformer.head.weight, model.transformer.embed.weight)
    assert model.transformer.head.weight.data_ptr() != model.transformer.embed.weight.data_ptr()


def test_mtp_copies_of_shared_weights_may_be_left_out_but_not_differ(exported: Path) -> None:
    before, _ = load_hf(exported)
    copies = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
    rewrite(exported, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != copies[0]})
    after, _ = load_hf(exported)
    assert_same_weights(before, after)
    rewrite(exported, lambda tensors: tensors | {copies[1]: tensors[copies[1]] + 1})
    with pytest.raises(InputError, match=r"(lm_head|shared_head.head).weight differs from .*head.weight"):
        load_hf(exported)


def test_mtp_layers_that_are_counted_but_not_there_are_left_out(exported: Path) -> None:
    rewrite(exported, lambda tensors: {name: t for name, t in tensors.items() if not name.startswith("model.layers.3")})
    model, config = load_hf(exported)
    assert config.num_nextn_predict_layers == len(model.mtp) == 0


def test_loading_reads_each_stored_tensor_once_and_shard_by_shard(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, read = [], []

    class Recorder:
        def __init__(self, file: Path, **options: Any) -> None:
            opened.append(file)
            self.inner = safe_open(file, **options)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.inner.get_tensor(name)

    monkeypatch.setattr("benthic.convert.checkpoint.safe_open", Recorder)
    load_hf(exported)
    assert opened == sorted(exported.glob("*.safetensors"))
    assert sorted(read) == sorted(published_names(huggingface.open_hf(exported).config))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Stores the changed tensors of a directory as one file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(change(tensors), folder / "model.safetensors")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
