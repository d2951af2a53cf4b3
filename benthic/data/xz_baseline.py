"""What a general compressor makes of the held-out text, the number a language model has to beat.

``xz -9e`` sees the training text and then the held-out text as one stream; what the held-out text adds to the
compressed size, per byte, is comparable with a model's bits per byte: both count the same plain text
(``Document.plain_text``) and both may use everything in the training split.
"""

import lzma

from benthic.config.schema import DataConfig
from benthic.data.corpus import read_corpus
from benthic.data.manifest import Manifest, Split
from benthic.data.split import split_documents, survey
from benthic.errors import InputError

_PRESET = 9 | lzma.PRESET_EXTREME


def xz_bits_per_byte(config: DataConfig, manifest: Manifest) -> float:
    """Bits per byte of the held-out split, compressed after the training split; reads the corpus anew.

    Raises ``InputError`` if the corpus is not there, or no longer the one that ``manifest`` describes.
    """
    threshold = survey(read_corpus(config.sources), config.validation_fraction, config.seed).threshold
    texts: dict[Split, list[str]] = {"train": [], "val": []}
    for split, document in split_documents(config.sources, config.seed, threshold):
        texts[split].append(document.plain_text)
    train, held_out = ("".join(texts[split]).encode() for split in ("train", "val"))
    if (len(train), len(held_out)) != (manifest.train.bytes, manifest.val.bytes):
        raise InputError(f"{', '.join(config.sources)}: changed since the data was prepared; there is no baseline")
    return (_compressed_size(train, held_out) - _compressed_size(train)) * 8 / len(held_out)


def _compressed_size(*parts: bytes) -> int:
    compressor = lzma.LZMACompressor(preset=_PRESET)
    return sum(len(compressor.compress(part)) for part in parts) + len(compressor.flush())
