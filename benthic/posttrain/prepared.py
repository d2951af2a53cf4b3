"""What was prepared for a run, text or conversations: in its own directory, or in that of the run it began with."""

from pathlib import Path

from benthic.config.schema import RunConfig
from benthic.data.manifest import FILE_NAME, Manifest, Split
from benthic.data.shards import TokenStore
from benthic.data.tokenizer import Tokenizer


def prepared(config: RunConfig, out: Path, name: str) -> list[Path]:
    """Folders of this name that are there, the run's own first."""
    runs = [out, *([Path(config.posttrain.base)] if config.posttrain.base else [])]
    return [run / name for run in runs if (run / name / FILE_NAME).is_file()]


def prepared_in(config: RunConfig, out: Path, name: str, tokenizer: Tokenizer) -> Path | None:
    """The first of them that is written in this tokenizer's tokens. Raises InputError if a manifest is damaged."""
    folders = prepared(config, out, name)
    return next((one for one in folders if Manifest.load(one).tokenizer_sha256 == tokenizer.fingerprint), None)


def prepared_store(config: RunConfig, out: Path, name: str, split: Split, tokenizer: Tokenizer) -> TokenStore | None:
    """What lies in it. Raises InputError if it is damaged."""
    folder = prepared_in(config, out, name, tokenizer)
    return TokenStore(folder, split) if folder else None
