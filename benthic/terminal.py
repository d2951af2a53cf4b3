"""Text from a model or a file from anywhere, made safe to show on a terminal."""

import unicodedata

_BIDIRECTIONAL_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def without_controls(text: str) -> str:
    """Text that can neither command a terminal nor reorder what is read: of control characters, only line ends and
    tabs are kept.
    """
    return "".join(character for character in text if character in "\n\t" or not _is_control(character))


def _is_control(character: str) -> bool:
    return unicodedata.category(character) == "Cc" or unicodedata.bidirectional(character) in _BIDIRECTIONAL_CONTROLS
