"""Shards give back what was written, whatever their size, and refuse to be read once any byte is wrong."""

import random

import numpy as np
import pytest

from benthic.data import shards
from benthic.data.manifest import Manifest
from benthic.data.shards import ShardWriter, TokenStore, token_dtype
from benthic.errors import InputError


@pytest.mark.parametrize("seed", range(6))
def test_tokens_come_back_from_any_number_of_shards(prepared, tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(shards, "SHARD_TOKENS", rng.randrange(1, 40))
    vocab_size = rng.choice([300, 1 << 16, 1 << 17])
    documents = [[rng.randrange(vocab_size) for _ in range(rng.randrange(1, 30))] for _ in range(rng.randrange(2, 20))]
    writers = {split: ShardWriter(tmp_path, split, token_dtype(vocab_size)) for split in ("train", "val")}
    for ids in documents:
        for writer in writers.values():
            writer.append(ids, 7)
    splits = {split: writer.close() for split, writer in writers.items()}
    Manifest.load(prepared / "data").model_copy(
        update={"vocab_size": vocab_size, "dtype": token_dtype(vocab_size), **splits}
    ).save(tmp_path)
    store = TokenStore(tmp_path, "val")
    stream = np.concatenate(documents)
    positions = np.random.default_rng(seed).integers(len(stream), size=(3, 17))
    np.testing.assert_array_equal(store.take(positions), stream[positions])
    assert store.document_ends_D.tolist() == np.cumsum([len(ids) for ids in documents]).tolist()
    assert splits["val"].bytes == 7 * len(documents)
    assert max(shard.items for shard in splits["val"].shards) <= shards.SHARD_TOKENS


def test_small_vocabularies_take_two_bytes():
    assert [token_dtype(size) for size in (261, 65536, 65537)] == ["uint16", "uint16", "uint32"]


@pytest.mark.parametrize("seed", range(12))
def test_any_flipped_or_missing_byte_is_refused_by_file(prepared, seed):
    rng = random.Random(seed)
    path = rng.choice([*sorted((prepared / "data").glob("train*")), prepared / "data" / "manifest.json"])
    data = bytearray(path.read_bytes())
    if seed % 2:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        del data[rng.randrange(len(data)) :]
    path.write_bytes(data)
    with pytest.raises(InputError, match=path.name) as refused:
        TokenStore(prepared / "data", "train")
    assert "\n" not in str(refused.value)


def test_a_missing_shard_and_a_missing_manifest_are_refused(prepared):
    (prepared / "data" / "train-00000.bin").unlink()
    with pytest.raises(InputError, match=r"train-00000\.bin"):
        TokenStore(prepared / "data", "train")
    with pytest.raises(InputError, match=r"manifest\.json"):
        TokenStore(prepared, "train")


def test_ids_out_of_the_vocabulary_are_refused(prepared):
    directory = prepared / "data"
    largest = TokenStore(directory, "train").take(np.arange(Manifest.load(directory).train_tokens)).max()
    Manifest.load(directory).model_copy(update={"vocab_size": int(largest)}).save(directory)
    with pytest.raises(InputError, match=rf"train-00000\.bin: token id {largest} is out of the vocabulary"):
        TokenStore(directory, "train")


def test_a_manifest_cannot_point_elsewhere(prepared):
    directory = prepared / "data"
    manifest = Manifest.load(directory)
    outside = manifest.train.shards[0].model_copy(update={"name": "../train-00000.bin"})
    manifest.model_copy(update={"train": manifest.train.model_copy(update={"shards": (outside,)})}).save(directory)
    with pytest.raises(InputError, match="beside its manifest"):
        TokenStore(directory, "train")
