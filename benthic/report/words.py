"""Numbers and foreign text as a reader gets them."""

import math
import re
from typing import Any

from benthic.terminal import without_controls

MOST_CHARACTERS = 2000
"""Of one text from outside."""
_NOT_TEXT = re.compile("[\ud800-\udfff\ufffe\uffff]")


def clean(text: Any, most: int = MOST_CHARACTERS) -> str:
    """Text from anywhere that can be written into any file: without control characters, and not endless."""
    text = str(text)
    shown = _NOT_TEXT.sub("\ufffd", without_controls(text[:most]))
    return shown if len(text) <= most else f"{shown} … ({len(text):,} characters)"


def figure(value: float) -> str:
    """A number in about four digits."""
    if not math.isfinite(value):
        return str(value)
    if value == round(value) and abs(value) < 1e15:
        return f"{round(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3e}"
    if abs(value) < 1e-4:
        return f"{value:.2e}"
    return f"{value:.4g}"


def large(value: float) -> str:
    """A count as one speaks of it: 3.1 million."""
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:,.0f}"


def hours(value: float) -> str:
    """A time, in the unit that suits it."""
    if value < 1 / 60:
        return f"{3600 * value:.3g} s"
    return f"{60 * value:.3g} min" if value < 1 else f"{value:,.4g} h"
