"""The conversation of ``benthic chat``: a line in, an answer streamed out, until the input ends.

It reads lines and writes text, so that a terminal, a pipe and a test are the same to it.
"""

import io
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TextIO

from benthic.data.chat import ChatFormat
from benthic.errors import InputError
from benthic.inference.engine import Engine
from benthic.terminal import without_controls

_HELP = """\
/reset, /clear   forget the conversation
/system TEXT     forget it, and begin anew with this instruction
/set KEY=VALUE   temperature, top_k, top_p, max_new_tokens or seed, as in /set temperature=0.5
/help            these lines
/quit, /exit     leave
Ctrl-C stops an answer, Ctrl-D leaves."""


def chat(engine: Engine, /, **sampling: Any) -> None:
    """Converse over standard input and output, with a prompt and line editing where they are a terminal.

    Raises:
        InputError: a setting is wrong.
    """
    conversation = Conversation(engine, **sampling)
    if sys.stdin.isatty():
        print("Ctrl-C stops an answer, Ctrl-D leaves, /help lists commands.")
        converse(conversation, _typed_lines(), sys.stdout)
    else:
        converse(conversation, _piped_lines(), sys.stdout)


def converse(conversation: "Conversation", lines: Iterable[str], out: TextIO) -> None:
    """Answer each line, or obey it if it begins with a slash; a mistake is told and changes nothing."""
    for line in lines:
        text = line.strip()
        if text in ("/quit", "/exit"):
            return
        try:
            _refuse_no_text(text)
            if text.startswith("/"):
                print(_obey(conversation, text), file=out)
            elif text:
                _write_answer(conversation, text, out)
        except InputError as error:
            print(f"error: {error}", file=out)


class Conversation:
    """Messages so far and sampling settings."""

    def __init__(self, engine: Engine, /, **sampling: Any) -> None:
        self.messages: list[dict[str, str]] = []
        self._engine = engine
        self._sampling: dict[str, Any] = {}
        self.set(**sampling)

    def reset(self, system: str = "") -> None:
        """Forget everything said, and begin with a system message if one is given."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def set(self, /, **sampling: Any) -> None:
        """Change settings of further answers; raises ``InputError`` if one is wrong."""
        self._engine.settings(**self._sampling | sampling)
        self._sampling |= sampling

    def answer(self, text: str) -> Iterator[str]:
        """Stream the answer; from its first piece on it is in the history with the question, as far as it got.

        Raises:
            InputError: ``text`` is too long for the model or the cache; at the call, and the history is as before.
        """
        asked, ids = self._fitting([*self.messages, {"role": "user", "content": text}])
        return self._answer(asked, self._engine.stream(ids, **self._sampling))

    def _answer(self, asked: list[dict[str, str]], stream: Iterator[str]) -> Iterator[str]:
        said = ""
        try:
            for piece in stream:
                said += piece
                yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": said}]

    def _fitting(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The messages without the oldest exchanges, so that a quarter of the context is left to answer; their ids."""
        ids = ChatFormat(self._engine.tokenizer).prompt(messages)
        first = 1 if messages[0]["role"] == "system" else 0
        if len(ids) <= self._engine.config.max_position_embeddings * 3 // 4 or len(messages) == first + 1:
            return messages, ids
        return self._fitting(messages[:first] + messages[first + 2 :])


def _typed_lines() -> Iterator[str]:
    """Lines typed at a terminal; Ctrl-C drops the one begun."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing and history
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()


def _piped_lines() -> Iterator[str]:
    """Lines of standard input; bytes that are not UTF-8 become surrogates, so that one line spoils no other."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    yield from sys.stdin


def _refuse_no_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("this line is not UTF-8 text; it is left out") from None


def _write_answer(conversation: Conversation, text: str, out: TextIO) -> None:
    try:
        for piece in conversation.answer(text):
            out.write(without_controls(piece))
            out.flush()
    except KeyboardInterrupt:
        out.write(" [stopped]")
    print(file=out, flush=True)


def _obey(conversation: Conversation, text: str) -> str:
    """Carry out a command and return what to say of it."""
    command, _, rest = text.partition(" ")
    if command == "/help":
        return _HELP
    if command in ("/reset", "/clear", "/system"):
        conversation.reset(rest.strip() if command == "/system" else "")
        return "[new conversation]"
    key, equals, value = rest.partition("=")
    if command == "/set" and equals:
        conversation.set(**{key.strip(): _number(value.strip())})
        return f"[{key.strip()} = {value.strip()}]"
    raise InputError(f"{text}: no such command; /help lists them")


def _number(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
