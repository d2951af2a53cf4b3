"""What a corpus is made of, so that readers, tokenizer and baselines agree on the text of a document.

The plain text of a document is what bits per byte counts and what ``xz`` is given: the text of each turn followed
by one newline. The newline stands for the token that ends a turn (a role marker or end-of-document), so both sides
pay for the boundary and neither is charged for how a role is spelled.
"""

import hashlib
from typing import Literal, NamedTuple, get_args

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)


class Turn(NamedTuple):
    """One speaker's text; plain documents are a single turn that nobody speaks."""

    role: Role | None
    text: str


class Document(NamedTuple):
    """A text or a conversation: the unit that is deduplicated, held out and masked."""

    turns: tuple[Turn, ...]

    @property
    def plain_text(self) -> str:
        """The text as counted in bits per byte: every turn and one newline after it."""
        return "".join(f"{turn.text}\n" for turn in self.turns)

    @property
    def unspoken(self) -> "Document":
        """The same turns, without who speaks."""
        return Document(tuple(Turn(None, turn.text) for turn in self.turns))


class Rejection(NamedTuple):
    """Part of a corpus that could not be used: where it starts in its file, in bytes, and why."""

    file: str
    offset: int
    reason: str


def plain_document(text: str) -> Document:
    """A document without speakers."""
    return Document((Turn(None, text),))


def digest(document: Document, seed: int = 0) -> int:
    """128-bit hash of the plain text: equal for exact duplicates, uniform in [0, 2**128) for each ``seed``."""
    salt = seed.to_bytes(16, "little")
    data = document.plain_text.encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=16, salt=salt).digest(), "big")
