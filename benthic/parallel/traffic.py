"""Bytes that this process sends to others, counted where they are sent."""

from collections import Counter
from typing import Literal

Kind = Literal["weights", "gradients", "copies", "dispatch", "combine", "counts"]


class Traffic:
    """Bytes by purpose: gathering weights, reducing gradients (and once more over copies of them), tokens on their way
    to experts and back, in either pass, and how many those are.
    """

    def __init__(self) -> None:
        self.sent: Counter[Kind] = Counter()

    def add(self, kind: Kind, size: float) -> None:
        """Count a message."""
        self.sent[kind] += round(size)

    def take(self) -> dict[str, int]:
        """What was sent since the last call."""
        sent, self.sent = dict(self.sent), Counter()
        return {str(kind): size for kind, size in sent.items()}
