"""Text as it is generated: a character split across tokens appears once it is whole, never as U+FFFD."""

import codecs

from benthic.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_WINDOW = 32


class StreamDecoder:
    """Turns token ids into text piece by piece.

    The pieces joined equal ``tokenizer.decode`` of all ids, but for a character at the end that was never completed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._sent = 0
        """Characters of the window's text that are already out."""
        self.holding = False
        """Whether a character waits to be completed."""

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes, possibly empty."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        whole = text.rstrip(_REPLACEMENT)
        piece = whole[self._sent :]
        self.holding = len(whole) < len(text)
        self._sent = max(self._sent, len(whole))
        if len(self._window) > _MAX_WINDOW and len(whole) == len(text):
            # The last token stays as context, for decoders that treat the start of a text differently.
            self._window = self._window[-1:]
            self._sent = len(self._tokenizer.decode(self._window))
        return piece

    def finish(self) -> str:
        """What is still held back at the end: U+FFFD for bytes that are no character, nothing for the beginning of one.

        Nothing changes by asking.
        """
        held = self._tokenizer.decode(self._window)[self._sent :]
        bytes_ = b"".join(self._tokenizer.token_bytes(index) for index in self._window)
        known = codecs.getincrementaldecoder("utf-8")("replace").decode(bytes_)[self._sent :]
        return held[: len(known) - len(known.rstrip(_REPLACEMENT))]
