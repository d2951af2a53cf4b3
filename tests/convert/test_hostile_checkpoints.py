"""Damaged and hostile directories: refused with one line that names the file, and nothing executed or read outside."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benthic.convert.huggingface import load_hf
from benthic.errors import InputError

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-"


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_hf(folder)
    assert "\n" not in str(caught.value)


def point_index(folder: Path, file: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = file
    (folder / INDEX).write_text(json.dumps(index))


def first_shard(folder: Path) -> Path:
    return next(folder.glob(f"{FIRST}*.safetensors"))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(first_shard(folder))
    change(tensors)
    save_file(tensors, first_shard(folder))


@pytest.mark.parametrize("name", [
    "../other/secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "a\0b", "\ud800",
], ids=ascii)  # fmt: skip
def test_an_index_cannot_lead_out_of_the_folder(name: str, exported: Path) -> None:
    (exported.parent / "other").mkdir()
    shutil.copy(first_shard(exported), exported.parent / "other" / "secret.safetensors")
    point_index(exported, name)
    refused(exported, "must be a plain name within the folder")


@pytest.mark.parametrize("value", [7, None, ["a"], {"b": 1}])
def test_an_index_maps_names_to_names(value: Any, exported: Path) -> None:
    point_index(exported, value)
    refused(exported, INDEX)


@pytest.mark.parametrize("linked", ["shard", "config.json", INDEX])
def test_a_link_cannot_lead_out_of_the_folder(linked: str, exported: Path) -> None:
    file = first_shard(exported) if linked == "shard" else exported / linked
    file.rename(exported.parent / "elsewhere")
    file.symlink_to(exported.parent / "elsewhere")
    refused(exported, f"{file.name}: a link that leads out of its folder")


def test_a_link_in_a_circle_is_named(exported: Path) -> None:
    file = first_shard(exported)
    file.unlink()
    file.symlink_to(file.name)
    refused(exported, f"{file.name}: cannot be read")


def test_a_pipe_in_place_of_a_shard_is_not_waited_for(exported: Path) -> None:
    file = first_shard(exported)
    file.unlink()
    os.mkfifo(file)
    refused(exported, f"{file.name}: must be a plain file")


def test_the_links_of_the_hugging_face_cache_are_followed(exported: Path) -> None:
    entry = exported.parent / "models--someone--model"
    snapshot = entry / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    for number, file in enumerate(sorted(exported.iterdir())):
        file.rename(entry / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    load_hf(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("/etc/passwd")
    refused(snapshot, "config.json: a link that leads out")


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_refused_unread(name: str, exported: Path, tmp_path: Path) -> None:
    for file in [*exported.glob("*.safetensors"), exported / INDEX]:
        file.unlink()
    (exported / name).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    refused(exported, f"{name}: pickled weights are never read")
    assert not (tmp_path / "executed").exists()


def test_a_pickle_behind_the_index_is_not_unpickled(exported: Path, tmp_path: Path) -> None:
    (exported / "evil.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    point_index(exported, "evil.bin")
    refused(exported, "evil.bin: header of")
    assert not (tmp_path / "executed").exists()


def test_a_missing_shard_is_named(exported: Path) -> None:
    file = first_shard(exported)
    file.unlink()
    refused(exported, f"{file.name}: cannot be read")


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_truncated_shard_is_named(keep: int, exported: Path) -> None:
    file = first_shard(exported)
    file.write_bytes(file.read_bytes()[:keep])
    refused(exported, f"{file.name}: .*damaged")


def test_trailing_bytes_are_refused(exported: Path) -> None:
    file = first_shard(exported)
    file.write_bytes(file.read_bytes() + b"extra")
    refused(exported, f"{file.name}: .*truncated or damaged")


def test_an_oversized_header_is_not_read(exported: Path) -> None:
    file = first_shard(exported)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 100 * 2**20))
        os.truncate(stream.fileno(), 200 * 2**20)
    refused(exported, f"{file.name}: header of {100 * 2**20} bytes")


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 15]}, {"dtype": "F32", "shape": [-1, -4]},
    {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 16]}, {"dtype": "F32", "data_offsets": [0, 16]},
    {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}, "text", None, 5, [],
    {"dtype": ["F32"], "shape": [2, 2], "data_offsets": [0, 16]},
    {"dtype": "F32", "shape": [2, 2], "data_offsets": "0 16"},
    {"dtype": "F32", "shape": [2, 2], "data_offsets": [-16, 0]},
], ids=str)  # fmt: skip
def test_malformed_header_entries_are_refused(entry: Any, exported: Path) -> None:
    file = first_shard(exported)
    header = json.dumps({"lm_head.weight": entry}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    refused(exported, f"{file.name}: ")


@pytest.mark.parametrize("header", [b"[1]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_headers_that_are_not_objects_are_refused(header: bytes, exported: Path) -> None:
    file = first_shard(exported)
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(exported, f"{file.name}: header is not a JSON object")


def test_a_tensor_that_is_not_where_the_index_says_is_named(exported: Path) -> None:
    point_index(exported, first_shard(exported).name)
    refused(exported, f"{first_shard(exported).name}: has no tensor lm_head.weight")


def test_a_wrong_shape_is_named(exported: Path) -> None:
    name = "model.embed_tokens.weight"
    change_tensors(exported, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    refused(exported, rf"{first_shard(exported).name}: {name} has shape \[60, 24\]: must be \[61, 24\]")


def test_an_integer_weight_is_refused(exported: Path) -> None:
    name = "model.embed_tokens.weight"
    change_tensors(exported, lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}))
    refused(exported, f"{name} has dtype I32: must be one of F64")


def test_a_missing_tensor_is_named(exported: Path) -> None:
    index = json.loads((exported / INDEX).read_text())
    del index["weight_map"]["model.layers.1.mlp.experts.4.up_proj.weight"]
    (exported / INDEX).write_text(json.dumps(index))
    refused(exported, "tensor model.layers.1.mlp.experts.4.up_proj.weight is missing")


def test_an_unexpected_tensor_is_named(exported: Path) -> None:
    index = json.loads((exported / INDEX).read_text())
    change_tensors(exported, lambda tensors: tensors.update({"model.layers.0.surprise": torch.zeros(2)}))
    index["weight_map"]["model.layers.0.surprise"] = first_shard(exported).name
    (exported / INDEX).write_text(json.dumps(index))
    refused(exported, f"{first_shard(exported).name}: unexpected tensor model.layers.0.surprise")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe{}", b'{"a": ' * 100_000])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_broken_json_is_named(name: str, text: bytes, exported: Path) -> None:
    (exported / name).write_bytes(text)
    refused(exported, f"{name}: ")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_huge_json_is_not_read(name: str, exported: Path) -> None:
    os.truncate(exported / name, 2**30)
    refused(exported, f"{name}: {2**30} bytes")


def test_a_folder_without_weights_or_config_is_refused(exported: Path) -> None:
    for file in [*exported.glob("*.safetensors"), exported / INDEX]:
        file.unlink()
    refused(exported, "holds neither model.safetensors.index.json nor model.safetensors")
    (exported / "config.json").unlink()
    refused(exported, "config.json: cannot be read")
