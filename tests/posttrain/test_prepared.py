"""Of what two runs have prepared, the first that is written in the model's tokens is read, and named in the run."""

import shutil

from benthic.data.manifest import FILE_NAME, Manifest
from benthic.data.tokenizer import Tokenizer
from benthic.files import sha256
from benthic.posttrain.prepared import prepared, prepared_in, prepared_store
from benthic.posttrain.rehearsal import borrowed


def test_text_in_other_tokens_is_passed_over(sft_config, make_sft_run, tmp_path):
    base, out = make_sft_run("base"), tmp_path / "out"
    tokenizer = Tokenizer.load(base / "tokenizer")
    config = sft_config()
    config = config.model_copy(update={"posttrain": config.posttrain.model_copy(update={"base": str(base)})})
    assert prepared_in(config, out, "data", tokenizer) == base / "data"
    shutil.copytree(base / "data", out / "data")
    assert prepared(config, out, "data") == [out / "data", base / "data"]
    assert prepared_in(config, out, "data", tokenizer) == out / "data"
    assert borrowed(config, out, tokenizer, 8) == {}
    Manifest.load(out / "data").model_copy(update={"tokenizer_sha256": "0" * 64}).save(out / "data")
    assert prepared_in(config, out, "data", tokenizer) == base / "data"
    assert prepared_store(config, out, "data", "train", tokenizer) is not None
    assert borrowed(config, out, tokenizer, 8) == {"rehearsed data": sha256(base / "data" / FILE_NAME)}
    assert borrowed(config, out, tokenizer, 0) == {}
