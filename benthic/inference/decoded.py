"""What a decode step is asked besides its rows, and what it gives.

Legend: B rows of the step, R rows that an MTP module reads first, V vocabulary, D model width, S sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from benthic.inference.sampling import Logits


@dataclass(frozen=True)
class Ahead:
    """Drafts of likeliest tokens that the step makes itself and then verifies: for models with one MTP module.

    A sequence may have several of the R rows, one after another; the module then goes on from the last, on its own
    output.
    """

    hidden_RD: Tensor
    """What the head sees at each position."""
    tokens_R: Sequence[int]
    """The token after it."""
    positions_R: Sequence[int]
    last_S: Sequence[int]
    """Index of each sequence's last row."""
    depth_S: Sequence[int]
    """Drafts wanted, at least one."""
    to_S: Sequence[int]
    """Row of the step whose token the first draft becomes, of the same sequence; the others become those of the rows
    after it."""


@dataclass(frozen=True)
class Decoded:
    """The outcome of one step."""

    tokens_B: list[int]
    """As they were given, drafts in their places."""
    logits_B: list[Logits]
    """Of the token after each."""
    hidden_BD: Tensor
    """After the final norm."""
    draft_s: float = 0.0
    """Seconds that drafts took."""
