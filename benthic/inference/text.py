"""Tokens on their way out: each leaves with its text once all the text up to it is certain.

A token waits while it ends in the middle of a character, or in what may become a stop string. So the pieces joined are
the text, and no text is left over without a token when a request ends.
"""

from collections.abc import Sequence

from benthic.data.stream_decoder import StreamDecoder
from benthic.data.tokenizer import Tokenizer
from benthic.inference.request import Token
from benthic.inference.stopping import StopScanner


class TextStream:
    """The text of one completion as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.text = ""
        """All that is out."""
        self._decoder, self._scanner = StreamDecoder(tokenizer), StopScanner(stops)
        self._waiting: list[Token] = []
        self._piece = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._scanner.stopped

    def push(self, token: Token) -> list[Token]:
        """Add a token, whose text is not known yet; return those that can go out, with theirs."""
        self._waiting.append(token)
        self._piece += self._scanner.push(self._decoder.push(token.id))
        return [] if self._decoder.holding or self._scanner.holding else self._released()

    def finish(self) -> list[Token]:
        """All that still waits, once no more will come."""
        self._piece += self._scanner.push(self._decoder.finish()) + self._scanner.finish()
        return self._released()

    def _released(self) -> list[Token]:
        if not self._waiting:
            return []
        *before, last = self._waiting
        released = [*before, Token(last.id, self._piece, last.logprob, last.top_logprobs)]
        self.text += self._piece
        self._waiting, self._piece = [], ""
        return released
