"""Stop strings in streamed text: nothing that may turn out to be part of one is released early."""

from collections.abc import Sequence


class StopScanner:
    """Cuts a stream of text at the first stop string to be completed, however the text is split into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = stops
        self._held = ""

    @property
    def holding(self) -> bool:
        """Whether text waits that may turn out to be the beginning of a stop string."""
        return bool(self._held)

    def push(self, piece: str) -> str:
        """Add a piece and return what can be released: text in which no stop string begins."""
        if not self._stops:
            return piece
        if self.stopped:
            return ""
        text = self._held + piece
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            # The first to end, not the first to begin: only so does the outcome not depend on the split.
            self.stopped, self._held = True, ""
            return text[: min(matches)[1]]
        released = len(text) - self._longest_beginning(text)
        self._held = text[released:]
        return text[:released]

    def finish(self) -> str:
        """The text still held back, once no more will come."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        longest = max(map(len, self._stops)) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
