"""Importing, exporting and finding models by their path, published FP8 checkpoints among them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benthic.config.load import dump_toml
from benthic.config.schema import ModelConfig, RunConfig, TrainConfig
from benthic.convert.huggingface import load_hf, save_hf
from benthic.convert.resolve import find_tokenizer, load_model
from benthic.convert.runs import export_hf, import_run
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.model import LanguageModel
from benthic.precision.blocks import quantise_blocks
from benthic.train import checkpoint

SmallConfig = Callable[..., ModelConfig]
RandomModel = Callable[..., LanguageModel]

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def slow_dequantise(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows, columns = (torch.arange(size) // 128 for size in weight.shape)
    return (weight.double() * scale.double()[rows][:, columns]).float()


def is_quantised(name: str) -> bool:
    """As in the release: projections of attention and experts, but not norms, router, embedding, head, eh_proj."""
    return name.endswith("_proj.weight") and "eh_proj" not in name


@pytest.fixture
def fp8(small_config: SmallConfig, random_model: RandomModel, tmp_path: Path) -> tuple[Path, LanguageModel]:
    """A directory as DeepSeek publishes it, with ragged blocks, and the model it stands for."""
    config = small_config(hidden_size=136, intermediate_size=130, moe_intermediate_size=129, kv_lora_rank=40)
    model = random_model(config)
    folder = tmp_path / "fp8"
    save_hf(model, config, None, folder, dtype=torch.bfloat16)
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    exact = {name: tensor.float() for name, tensor in stored.items()}
    for name in filter(is_quantised, list(stored)):
        stored[name], stored[f"{name}_scale_inv"] = quantise_blocks(stored[name])
        exact[name] = slow_dequantise(stored[name], stored[f"{name}_scale_inv"])
    save_file(stored, folder / "model.safetensors")
    save_file(exact, file)
    expected, _ = load_hf(folder, dtype=torch.float32)
    file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": FP8}))
    return folder, expected


def test_published_fp8_is_read_block_for_block(fp8: tuple[Path, LanguageModel]) -> None:
    folder, expected = fp8
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        loaded, _ = load_hf(folder, dtype=dtype)
        for name, tensor in loaded.transformer.state_dict().items():
            wanted = expected.transformer.state_dict()[name]
            assert torch.equal(tensor, wanted if name.endswith("router.bias") else wanted.to(dtype)), name


@pytest.mark.parametrize("damage", ["no scale", "scale of another shape", "no quantization_config", "half scale"])
def test_fp8_that_does_not_fit_together_is_refused(damage: str, fp8: tuple[Path, LanguageModel]) -> None:
    folder, _ = fp8
    tensors = load_file(folder / "model.safetensors")
    scale = "model.layers.0.mlp.up_proj.weight_scale_inv"
    assert tensors[scale].shape == (2, 2)
    if damage == "no scale":
        del tensors[scale]
    elif damage == "scale of another shape":
        tensors[scale] = torch.ones(2, 1)
    elif damage == "half scale":
        tensors[scale] = tensors[scale].half()
    else:
        raw = json.loads((folder / "config.json").read_text())
        del raw["quantization_config"]
        (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors: model.*proj.weight"):
        load_hf(folder)


def test_an_imported_model_is_dequantised_and_loads_like_any_run(
    fp8: tuple[Path, LanguageModel], tmp_path: Path
) -> None:
    folder, _ = fp8
    report = import_run(folder, tmp_path / "run")
    stored = {name for file in (tmp_path / "run" / "model").glob("*.safetensors") for name in load_file(file)}
    assert report.tensors == len(stored)
    assert report.dequantised == sum(map(is_quantised, stored)) > 10
    assert (report.dtype, report.mtp_layers, report.tokenizer) == ("bfloat16", 1, False)
    assert "quantization_config" not in json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert not any("scale_inv" in name for name in stored)
    direct, config = load_hf(folder)
    through_run, found = load_model(tmp_path / "run")
    assert found == config
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, through_run.state_dict()[name]), name


@pytest.fixture
def with_tokenizer(small_config: SmallConfig, random_model: RandomModel, tmp_path: Path) -> Path:
    tokenizer = Tokenizer.train(["some text to learn from, some more text"], vocab_size=280)
    tokenizer.save(tmp_path / "tokenizer")
    config = small_config(vocab_size=tokenizer.vocab_size)
    save_hf(random_model(config), config, tmp_path / "tokenizer", tmp_path / "hf")
    return tmp_path / "hf"


def test_import_and_export_return_the_same_files(with_tokenizer: Path, tmp_path: Path) -> None:
    assert import_run(with_tokenizer, tmp_path / "run").tokenizer
    export_hf(tmp_path / "run", tmp_path / "back")
    original, back = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (with_tokenizer, tmp_path / "back")
    )
    assert original == {name: content for name, content in back.items() if name != "README.md"}
    assert Tokenizer.load(find_tokenizer(tmp_path / "run")).stop_ids == Tokenizer.load(with_tokenizer).stop_ids


def test_ids_that_end_a_turn_survive_an_import(with_tokenizer: Path, tmp_path: Path) -> None:
    (with_tokenizer / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 77]}))
    import_run(with_tokenizer, tmp_path / "run")
    assert 77 in Tokenizer.load(find_tokenizer(tmp_path / "run")).stop_ids


def test_an_import_does_not_touch_what_is_there(with_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match="run: already there"):
        import_run(with_tokenizer, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("target", ["imported/model", "imported/model/inside"])
def test_an_export_never_replaces_the_model_of_a_run(target: str, with_tokenizer: Path, tmp_path: Path) -> None:
    imported = tmp_path / "imported"
    import_run(with_tokenizer, imported)
    before = {path: path.read_bytes() for path in imported.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="is the model of the run"):
        export_hf(with_tokenizer, tmp_path / target)
    assert {path: path.read_bytes() for path in imported.rglob("*") if path.is_file()} == before


def test_an_import_is_not_replaced_although_nothing_is_beside_it(with_tokenizer: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(with_tokenizer, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    import_run(bare, tmp_path / "imported")
    model = tmp_path / "imported" / "model"
    assert list((tmp_path / "imported").iterdir()) == [model]
    before = {path: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(InputError, match="imported/model: already there and not replaced"):
        export_hf(with_tokenizer, model)
    assert {path: path.read_bytes() for path in model.iterdir()} == before


def test_the_result_of_a_training_is_not_replaced_by_an_export_nor_the_other_way_round(
    with_tokenizer: Path, tmp_path: Path
) -> None:
    model, config = load_model(with_tokenizer)
    save_hf(model, config, with_tokenizer, tmp_path / "x" / "model", purpose="training")
    save_hf(model, config, with_tokenizer, tmp_path / "x" / "model", purpose="training")
    with pytest.raises(InputError, match="model: already there and not replaced"):
        export_hf(with_tokenizer, tmp_path / "x" / "model")
    export_hf(with_tokenizer, tmp_path / "exported")
    export_hf(with_tokenizer, tmp_path / "exported")
    with pytest.raises(InputError, match="exported: already there and not replaced"):
        save_hf(model, config, with_tokenizer, tmp_path / "exported", purpose="training")


def test_a_refused_import_writes_nothing(with_tokenizer: Path, tmp_path: Path) -> None:
    next(with_tokenizer.glob("*.safetensors")).write_bytes(b"broken")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="safetensors"):
        import_run(with_tokenizer, tmp_path / "run")
    assert sorted(tmp_path.iterdir()) == before


def test_the_newest_checkpoint_of_a_run_is_loaded(
    small_config: SmallConfig, random_model: RandomModel, tmp_path: Path
) -> None:
    config = small_config()
    (tmp_path / "config.toml").write_text(
        dump_toml(RunConfig(model=config, train=TrainConfig(steps=2, sequence_length=64)))
    )
    for step in (1, 2):
        weights = checkpoint.Checkpoint({"model": random_model(config, seed=step).state_dict()}, {"step": step})
        checkpoint.save(tmp_path / "checkpoints" / "pretrain", step, weights, keep=2)
    model, found = load_model(tmp_path)
    assert found == config
    for name, tensor in random_model(config, seed=2).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    half, _ = load_model(tmp_path, dtype=torch.bfloat16)
    assert half.transformer.layers[1].ffn.router.bias.dtype == torch.float32
    assert half.transformer.head.weight.dtype == torch.bfloat16


def test_a_checkpoint_counts_only_while_it_is_newer_than_the_model(
    small_config: SmallConfig, random_model: RandomModel, tmp_path: Path
) -> None:
    config = small_config()
    run = RunConfig(model=config, train=TrainConfig(steps=2, sequence_length=64))
    (tmp_path / "config.toml").write_text(dump_toml(run))
    models = [random_model(config, seed=seed) for seed in (1, 2)]
    groups = {"model": models[0].state_dict(), "optimizer": {"large": torch.zeros(2)}}
    saved = checkpoint.save(tmp_path / "checkpoints" / "pretrain", 1, checkpoint.Checkpoint(groups, {"step": 1}), 2)
    save_hf(models[1], config, None, tmp_path / "model")
    written = (tmp_path / "model" / "config.json").stat().st_mtime_ns
    for difference, expected in ((-1, models[1]), (1, models[0])):
        os.utime(saved / "manifest.json", ns=(written, written + difference * 10**9))
        found, _ = load_model(tmp_path)
        assert torch.equal(found.transformer.head.weight, expected.transformer.head.weight)


def test_of_a_checkpoint_only_weights_are_read_and_an_average_goes_before_them(
    small_config: SmallConfig, random_model: RandomModel, tmp_path: Path
) -> None:
    config = small_config()
    run = RunConfig(model=config, train=TrainConfig(steps=2, sequence_length=64))
    (tmp_path / "config.toml").write_text(dump_toml(run))
    last, average = (random_model(config, seed=seed) for seed in (1, 2))
    groups = {
        "model": last.state_dict(), "average": dict(average.named_parameters()), "optimizer": {"m": torch.zeros(2)}
    }  # fmt: skip
    saved = checkpoint.save(tmp_path / "checkpoints" / "pretrain", 1, checkpoint.Checkpoint(groups, {"step": 1}), 2)
    (saved / "optimizer.safetensors").write_bytes(b"damaged, but of no interest")
    found, _ = load_model(tmp_path)
    assert torch.equal(found.transformer.head.weight, average.transformer.head.weight)
    bias = "transformer.layers.1.ffn.router.bias"  # moved by the balancing, not by the optimizer
    assert torch.equal(found.state_dict()[bias], last.state_dict()[bias])


def test_copies_that_differ_are_found_at_import(with_tokenizer: Path, tmp_path: Path) -> None:
    (file,) = with_tokenizer.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.3.embed_tokens.weight"][5, 3] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"embed_tokens.weight differs from .*embed_tokens.weight"):
        import_run(with_tokenizer, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("find", [load_model, find_tokenizer])
def test_a_path_with_nothing_to_load_is_refused(find: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent: no such directory; give a run directory"):
        find(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: not a directory"):
        find(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: holds no"):
        find(tmp_path / "empty")
