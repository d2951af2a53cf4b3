"""Output that keeps to a JSON schema or a regular expression, by llguidance.

Some schemas take forever to compile, and the library cannot be interrupted. So each is compiled in a small process
first, which is ended if it takes too long; only what has passed there is compiled in this one.
"""

import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from benthic.serve.errors import bad, shutting_down, unavailable
from benthic.serve.matcher import build_matcher, load_tokenizer

MAX_SOURCE = 256 << 10
"""Characters of the longest schema."""
_KEPT = 64
_START_SECONDS = 60.0
_ENDED = ""
"""Stands for an answer where the process has ended."""


class GrammarConstraint:
    """Tells the engine which tokens may come next; one for each choice."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self.failed = False
        """Whether the grammar turned out too complex while it was used; the text then ends where it is."""

    def mask(self, vocab_size: int) -> Tensor:
        """Allowed tokens as bits, int32 (ceil(V / 32),), the lowest first."""
        words = torch.zeros(-(-vocab_size // 32), dtype=torch.int32)
        packed = self._bits()
        if packed is None:
            self.failed = True
            return words
        words.view(torch.uint8)[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)[
            : 4 * len(words)
        ]
        return words

    def accept(self, token: int) -> None:
        """Go on by one token."""
        try:
            self.failed |= not self._matcher.is_stopped() and not self._matcher.consume_token(token)
        except Exception:  # an exception here would end the engine, and with it all other requests
            self.failed = True

    def _bits(self) -> bytes | None:
        """The library's mask; None if it has given up."""
        if self.failed:
            return None
        try:
            packed: bytes = self._matcher.compute_bitmask()
            return None if self._matcher.is_error() else packed
        except Exception:  # as in accept
            return None


Grammar = Callable[[], GrammarConstraint]
"""Something compiled: makes a constraint for each choice."""


class Grammars:
    """Compiles what requests ask for, in terms of one tokenizer; the last few are kept.

    Args:
        tokenizer_json: the tokenizer's file.
        vocab_size: tokens that the model has.
        stop_ids: tokens that end a text.
        seconds: for one compilation.
    """

    def __init__(self, tokenizer_json: Path, vocab_size: int, stop_ids: Sequence[int], seconds: float) -> None:
        self._arguments = (str(tokenizer_json), vocab_size, sorted(stop_ids))
        self._seconds = seconds
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._starting = threading.Lock()
        self._checker: _Checker | None = None
        self._closed = False
        self._known: OrderedDict[str, Any] = OrderedDict()

    def schema(self, schema: dict[str, Any], param: str, *, lenient: bool = False) -> Grammar:
        """JSON that the schema describes. Raises 400 that names ``param``. Blocks.

        ``lenient`` passes over keywords that the library does not know, where only mistakes are to be found.
        """
        try:
            return self._grammar(json.dumps({"schema": schema, "lenient": lenient}), param)
        except (ValueError, RecursionError):
            raise bad(f"{param}: too deep", param) from None

    def schema_or_calls(self, schema: dict[str, Any], call: dict[str, Any], param: str, *, several: bool) -> Grammar:
        """JSON that one schema describes, or a call (or several) that the other does. As :meth:`schema`."""
        try:
            return self._grammar(json.dumps({"schema": schema, "call": call, "several": several}), param)
        except (ValueError, RecursionError):
            raise bad(f"{param}: too deep", param) from None

    def regex(self, regex: str, param: str) -> Grammar:
        """Text that the regular expression matches as a whole. As :meth:`schema`."""
        return self._grammar(json.dumps({"regex": regex}), param)

    def close(self) -> None:
        """End the process that compiles, even while it starts or works."""
        with self._starting:
            self._closed = True
        if self._checker is not None:
            self._checker.close()

    def _grammar(self, source: str, param: str) -> Grammar:
        if len(source) > MAX_SOURCE:
            raise bad(f"{param}: {len(source)} characters; at most {MAX_SOURCE} are compiled", param)
        with self._lock:
            if source not in self._known:
                self._known[source] = self._compiled(source, param)
            self._known.move_to_end(source)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
            found = self._known[source]
        if isinstance(found, str):
            raise bad(f"{param}: {found}", param)
        return lambda: GrammarConstraint(found.deep_copy())

    def _compiled(self, source: str, param: str) -> Any:
        """A matcher, or what is wrong with the source. Raises 400 if that is not known: another time it may pass."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(*self._arguments)
        checker = self._running_checker()
        try:
            wrong = checker.check(source, self._seconds)
        except _Undecided as error:
            self._refuse_if_closed()
            raise bad(f"{param}: {error}", param) from None
        return build_matcher(self._tokenizer, source) if wrong is None else wrong

    def _running_checker(self) -> "_Checker":
        if self._checker is not None and self._checker.alive:
            return self._checker
        with self._starting:
            self._refuse_if_closed()
            checker = self._checker = _Checker((*self._arguments, self._seconds))
        if not checker.is_ready(_START_SECONDS):
            checker.close()
            self._refuse_if_closed()
            raise unavailable("the process that compiles schemas does not start", 5)
        return checker

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise shutting_down()


class _Undecided(Exception):
    """It has not been found out whether a source can be compiled."""


class _Checker:
    """The process that compiles first, one source at a time."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        command = [sys.executable, "-m", "benthic.serve.grammar_checker", json.dumps(arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
        self._answers: SimpleQueue[str] = SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def is_ready(self, seconds: float) -> bool:
        """Whether it starts within so many seconds; to be asked once."""
        return self._answer(seconds) == "ready"

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def check(self, source: str, seconds: float) -> str | None:
        """What is wrong with a source; None if nothing. Raises _Undecided if it takes too much time or memory."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError, ValueError):  # it has ended, or has been closed meanwhile
            self._process.stdin.write(source + "\n")
            self._process.stdin.flush()
        answer = self._answer(seconds)
        if answer is None or answer == _ENDED:
            self.close()
            raise _Undecided(f"not compiled within {seconds:g} s" if answer is None else "too large to compile")
        return None if answer == "fine" else answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # of what it has not read
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._answers.put(json.loads(line))
        self._answers.put(_ENDED)

    def _answer(self, seconds: float) -> str | None:
        try:
            return self._answers.get(timeout=seconds)
        except Empty:
            return None
