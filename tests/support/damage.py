"""Damage to a saved checkpoint that whoever loads it must notice, and name the file."""

import random

import pytest

from benthic.errors import InputError
from benthic.train.checkpoint import load

CHANGES = {
    "shorter": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "gone": None,
    "empty": lambda content: b"",
}


def refused_with_any_byte_flipped(saved, name):
    """One bit of every byte of a file, in turn; whole again, it loads."""
    content = (saved / name).read_bytes()
    rng = random.Random(name)
    for offset in range(len(content)):
        flipped = bytearray(content)
        flipped[offset] ^= 1 << rng.randrange(8)
        (saved / name).write_bytes(flipped)
        # A byte of the manifest may be another file's hash, and then that file is the one that does not match.
        blamed = f"{saved.name}/" if name == "manifest.json" else name
        with pytest.raises(InputError, match=blamed):
            load(saved)
    (saved / name).write_bytes(content)
    load(saved)


def refused_once_changed(saved, name, change):
    """A file that is ``shorter``, ``longer``, ``gone`` or ``empty``."""
    if (changed := CHANGES[change]) is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(changed((saved / name).read_bytes()))
    with pytest.raises(InputError, match=name):
        load(saved)
