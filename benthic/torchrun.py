"""What torchrun tells the processes that it starts, through their environment; without it there is one."""

import os

from benthic.errors import InputError


def rank() -> int:
    """This process's number; 0 is the one that speaks to people."""
    return _number("RANK", 0)


def processes() -> int:
    """How many were started, on all nodes."""
    return _number("WORLD_SIZE", 1)


def processes_here() -> int:
    """How many of them are on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise InputError(f"the environment variable {name}={text!r} must be a whole number, as torchrun sets it")
    return int(text)
