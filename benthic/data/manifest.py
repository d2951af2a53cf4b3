"""What was prepared, from what and with which settings: written last, so that data without it was never finished."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import ValidationError, model_validator

from benthic.config.base import Settings
from benthic.config.schema import DataConfig
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

    @model_validator(mode="after")
    def _settings_can_be_used(self) -> Self:
        if type(vocab_size := self.settings.get("vocab_size")) is not int:
            raise ValueError(f"settings.vocab_size={vocab_size!r:.40} must be a number")
        DataConfig.model_validate(self._data_settings())
        return self

    def _data_settings(self) -> dict[str, Any]:
        return {key: value for key, value in self.settings.items() if key in DataConfig.model_fields}

    def prepared(self, asked: DataConfig) -> DataConfig:
        """The settings that this data was prepared with; those that only training reads are as asked for."""
        # What was prepared before there was a choice has conversations in the chat format.
        return DataConfig.model_validate({**asked.model_dump(), "conversations": "chat", **self._data_settings()})

    def remarks(self) -> list[str]:
        """What whoever prepared this may not expect: text left out, much more held out than was asked for."""
        asked, held_out = self.prepared(DataConfig()).validation_fraction, self.val.bytes / max(1, self.bytes)
        remarks = []
        if self.rejections:
            file, offset, reason = self.rejections[0]
            examples = "" if self.rejected == 1 else f"; the manifest lists {len(self.rejections)} under rejections"
            remarks.append(f"rejected: {self.rejected}, first {file} at byte {offset}: {reason}{examples}")
        if held_out > 2 * asked:
            remarks.append(
                f"{held_out:.0%} of the text is held out, where data.validation_fraction={asked:g}: of "
                f"{self.documents} documents, {self.val.documents} make up so much; more and shorter ones split better"
            )
        return remarks

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
