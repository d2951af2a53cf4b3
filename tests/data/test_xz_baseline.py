"""The baseline is what the xz program itself makes of the same two texts."""

import shutil
import subprocess

import pytest

from benthic.data.corpus import read_corpus
from benthic.data.manifest import Manifest
from benthic.data.split import split_documents, survey
from benthic.data.xz_baseline import xz_bits_per_byte
from benthic.errors import InputError


@pytest.mark.skipif(shutil.which("xz") is None, reason="xz is not installed")
def test_as_xz_does_it(prepared, data_config):
    fraction, seed = data_config.validation_fraction, data_config.seed
    threshold = survey(read_corpus(data_config.sources), fraction, seed).threshold
    texts = {"train": b"", "val": b""}
    for split, document in split_documents(data_config.sources, seed, threshold):
        texts[split] += document.plain_text.encode()

    def size(data):
        command = ["xz", "-9e", "--threads=1", "--stdout"]
        return len(subprocess.run(command, input=data, capture_output=True, check=True).stdout)

    expected = (size(texts["train"] + texts["val"]) - size(texts["train"])) * 8 / len(texts["val"])
    manifest = Manifest.load(prepared / "data")
    assert xz_bits_per_byte(data_config, manifest) == pytest.approx(expected, rel=0.01)
    altered = manifest.model_copy(update={"val": manifest.val.model_copy(update={"bytes": manifest.val.bytes + 1})})
    with pytest.raises(InputError, match="changed since the data was prepared"):
        xz_bits_per_byte(data_config, altered)
    assert (len(texts["train"]), len(texts["val"])) == (manifest.train.bytes, manifest.val.bytes)
