"""What was prepared, from what and with which settings: written last, so that data without it was never finished."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import ValidationError

from benthic.config.schema import DataConfig, Settings
from benthic.data.document import Rejection
from benthic.errors import InputError
from benthic.files import read_json_object, write_atomically

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)
FILE_NAME = "manifest.json"


class DataFile(Settings):
    """A binary file beside the manifest; ``items`` are tokens, or documents in an index of boundaries."""

    name: str
    items: int
    sha256: str


class SplitManifest(Settings):
    """One split: ``bytes`` is the UTF-8 size of its plain text, the denominator of bits per byte."""

    documents: int
    tokens: int
    bytes: int
    shards: tuple[DataFile, ...]
    boundaries: DataFile


class Manifest(Settings):
    """Totals over both splits, what was left out, and the settings that tell whether to prepare again."""

    documents: int
    tokens: int
    bytes: int
    rejected: int
    duplicates: int
    train_tokens: int
    val_tokens: int
    vocab_size: int
    dtype: Literal["uint16", "uint32"]
    tokenizer_sha256: str
    settings: dict[str, Any]
    rejections: tuple[Rejection, ...]
    """The first few of ``rejected``."""
    train: SplitManifest
    val: SplitManifest

    def prepared(self, asked: DataConfig) -> DataConfig:
        """The settings that this data was prepared with; those that only training reads are as asked for."""
        known = {key: value for key, value in self.settings.items() if key in DataConfig.model_fields}
        return DataConfig.model_validate({**asked.model_dump(), **known})

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read ``manifest.json`` of a data directory; raises ``InputError`` if it is missing or was altered."""
        path = Path(directory) / FILE_NAME
        if not path.exists():
            raise InputError(f"{path}: no such file; prepare the data first, with: benthic data")
        content = read_json_object(path)
        checksum = content.pop("checksum", None)
        if checksum != _checksum(content):
            raise InputError(f"{path}: does not match its checksum; delete {path.parent} and prepare the data again")
        try:
            return cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            problem = error.errors()[0]
            raise InputError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None

    def save(self, directory: Path) -> None:
        """Write ``manifest.json`` atomically."""
        content = self.model_dump(mode="json")
        write_atomically(directory / FILE_NAME, json.dumps({**content, "checksum": _checksum(content)}, indent=2))


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
