"""Which documents are used and which are held out: a function of their text and a seed, not of their order."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from benthic.data.corpus import read_corpus
from benthic.data.document import Document, Rejection, digest
from benthic.data.manifest import Split
from benthic.errors import InputError

KEPT_EXAMPLES = 20


class Survey(NamedTuple):
    """Counts of a first pass over a corpus; documents whose digest is at most ``threshold`` are held out."""

    documents: int
    duplicates: int
    rejected: int
    rejections: tuple[Rejection, ...]
    threshold: int


def survey(
    items: Iterable[Document | Rejection], validation_fraction: float, seed: int, threshold: int | None = None
) -> Survey:
    """Count a corpus and fix its split.

    The ``validation_fraction`` of unique documents with the smallest digests is held out, at least one and not all; or
    all up to the ``threshold`` of another corpus' split, so that none changes sides that is in both.
    Raises ``InputError`` if there are fewer than two documents.
    """
    digests, duplicates, rejected, examples = set[int](), 0, 0, list[Rejection]()
    for item in items:
        if isinstance(item, Rejection):
            rejected += 1
            examples += [item] if len(examples) < KEPT_EXAMPLES else []
        elif (key := digest(item, seed)) in digests:
            duplicates += 1
        else:
            digests.add(key)
    if len(digests) < 2:
        first = "".join(f"; rejected: {file} at byte {offset}: {reason}" for file, offset, reason in examples[:1])
        raise InputError(
            f"the corpus has {len(digests)} usable document(s), at least 2 are needed to hold one out{first}"
        )
    wanted = round(validation_fraction * len(digests))
    if threshold is not None:
        wanted = sum(key <= threshold for key in digests)
    held_out = min(max(1, wanted), len(digests) - 1)
    return Survey(len(digests), duplicates, rejected, tuple(examples), sorted(digests)[held_out - 1])


def split_documents(sources: Sequence[str], seed: int, threshold: int) -> Iterator[tuple[Split, Document]]:
    """The unique documents of a corpus in its order, each with its split."""
    seen = set[int]()
    for item in read_corpus(sources):
        if isinstance(item, Document) and (key := digest(item, seed)) not in seen:
            seen.add(key)
            yield ("val" if key <= threshold else "train"), item
