"""Whom answers are asked of: an OpenAI-compatible endpoint, or a model of one's own in this process.

An endpoint may be far away, busy, broken or hostile. Every request has one limit of time, from its first byte to the
last of its answer, and one of size; what fails for the moment is tried again at growing intervals; redirections are not
followed, for they would take the key along.
"""

import http.client
import json
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

from benthic.config.posttrain import DistilConfig
from benthic.data.chat import ChatFormat
from benthic.data.chat_template import Message
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError, WorkFailed
from benthic.inference.batching import BatchEngine
from benthic.inference.request import Sampling
from benthic.model import LanguageModel
from benthic.terminal import without_controls
from benthic.version import VERSION

MOST_BYTES = 16 << 20
"""Of a reply."""
_TRY_AGAIN = {408, 409, 425, 429}
_OF_THIS_PROMPT = {400, 413, 422}
"""The endpoint's answer where it refuses what it is asked, but may take other prompts."""
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
"""Seconds between tries."""
_CONNECT_SECONDS = 15.0
_LONGEST_WHY = 300
_UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
_Parsed = TypeVar("_Parsed")


class Told(NamedTuple):
    """A teacher's answer."""

    text: str
    reasoning: str
    """What it thought before, where the endpoint tells it apart."""
    finished: bool
    """Whether it came to its own end."""
    tokens: int | None
    """Of the answer, as far as the teacher counts them."""


class Refused(Exception):
    """The teacher does not take this prompt, now or later; it may take others."""


class NoAnswer(Exception):
    """Nothing that could be used came, however often it was asked for; it may come another time."""


class Teacher(Protocol):
    """Answers; from several threads at the same time."""

    name: str
    """As provenance names it."""

    def ask(self, messages: Sequence[Message], seed: int) -> Told:
        """An answer to a conversation that ends with the user; ``seed`` has at most 31 bits.

        Raises:
            Refused: this prompt is not taken.
            NoAnswer: for the moment none is to be had.
            InputError: there is no use in asking anything: a wrong address, model or key.
            WorkFailed: it can answer no more.
        """

    def close(self) -> None:
        """Give up what is under way."""


class Endpoint:
    """Behind an address such as ``http://127.0.0.1:8000/v1``.

    Raises:
        InputError: the address is none, the variable with the key is not set, or it cannot be told which model to ask.
        WorkFailed: it does not answer.
    """

    def __init__(self, config: DistilConfig) -> None:
        self._config, self._stopped = config, threading.Event()
        self._open, self._lock = set[socket.socket](), threading.Lock()
        try:
            parts = urlsplit(config.teacher)
            self._port = parts.port
        except ValueError as error:
            raise InputError(f"posttrain.distil.teacher = {config.teacher!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"posttrain.distil.teacher = {config.teacher!r}: must be like http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InputError(
                "posttrain.distil.teacher: must have no user, password, query or fragment; name the environment "
                "variable with a key as posttrain.distil.api_key_env"
            )
        self._secure, self._host, self._path = parts.scheme == "https", parts.hostname, parts.path.rstrip("/")
        self._headers = {"content-type": "application/json", "user-agent": f"benthic/{VERSION}", **self._key()}
        self._model = config.model or self._only_model()
        self.name = f"{config.teacher} {self._model}"

    def _key(self) -> dict[str, str]:
        variable = self._config.api_key_env
        if variable is None:
            return {}
        key = os.environ.get(variable, "").strip()
        if not key:
            raise InputError(f"posttrain.distil.api_key_env: the environment has no {variable}")
        if not key.isascii() or not key.isprintable():
            raise InputError(f"posttrain.distil.api_key_env: {variable} holds what is no key")
        return {"authorization": f"Bearer {key}"}

    def _only_model(self) -> str:
        try:
            listed = self._try("GET", "/models", None, _names)
        except (NoAnswer, Refused) as error:
            raise WorkFailed(str(error)) from None
        if len(listed) == 1:
            return listed[0]
        raise InputError(
            f"posttrain.distil.model: must be given; {self._config.teacher} has {_short(', '.join(listed)) or 'none'}"
        )

    def ask(self, messages: Sequence[Message], seed: int) -> Told:
        """As :meth:`Teacher.ask`."""
        config = self._config
        body = {
            "model": self._model, "messages": list(messages), "max_tokens": config.max_new_tokens,
            "temperature": config.temperature, "top_p": config.top_p, "seed": seed, "stream": False,
        }  # fmt: skip
        return self._try("POST", "/chat/completions", json.dumps(body).encode(), _told)

    def close(self) -> None:
        """Close all connections; who waits for them gets :class:`NoAnswer`."""
        self._stopped.set()
        with self._lock:
            for one in self._open:
                _shut(one)

    def _try(self, method: str, path: str, body: bytes | None, parse: Callable[[bytes], _Parsed]) -> _Parsed:
        """What ``parse``, which may raise, makes of a reply; asked for again where that may help."""
        why, wait = "", _FIRST_WAIT
        for left in range(self._config.retries, -1, -1):
            asked_to_wait = 0.0
            try:
                status, content, asked_to_wait = self._once(method, path, body)
                if status == 200:
                    return parse(content)
                why = f"status {status}: {_complaint(content)}"
                self._refuse_for_good(status, path, why)
            except InputError:
                raise
            except _UNREADABLE as error:
                why = f"a reply that cannot be read: {type(error).__name__}: {_short(str(error))}"
            except (OSError, http.client.HTTPException) as error:
                why = f"{type(error).__name__}: {_short(str(error))}"
            # A share of chance, so that those who failed together do not come back together.
            pause = min(_LONGEST_WAIT, max(asked_to_wait, wait * random.uniform(0.5, 1.5)))
            if not left or self._stopped.wait(pause):
                break
            wait *= 2
        raise NoAnswer(f"{self._config.teacher}: {why}")

    def _refuse_for_good(self, status: int, path: str, why: str) -> None:
        """Raise Refused or InputError where asking again is of no use."""
        if status in _OF_THIS_PROMPT:
            raise Refused(why)
        if status not in _TRY_AGAIN and status < 500:
            raise InputError(f"{self._config.teacher}{path}: {why}")

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes, float]:
        """Status, content, and the seconds it asks to be left alone for. Raises OSError or HTTPException."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=min(_CONNECT_SECONDS, self._config.timeout_seconds))
        connection.connect()
        connection.sock.settimeout(self._config.timeout_seconds)
        with closing(connection), self._in_time(connection.sock):
            connection.request(method, self._path + path, body, self._headers)
            with connection.getresponse() as response:
                content = response.read(MOST_BYTES + 1)
                asked_to_wait = _seconds(response.headers.get("retry-after"))
        if len(content) > MOST_BYTES:
            raise http.client.HTTPException(f"more than {MOST_BYTES} bytes")
        return response.status, content, asked_to_wait

    @contextmanager
    def _in_time(self, link: socket.socket) -> Iterator[None]:
        """Within it the connection is shut when its time is over, however slowly it drips: a socket's own limit is for
        each piece. Whatever came of that is then a TimeoutError.
        """
        late, seconds = threading.Event(), self._config.timeout_seconds

        def end() -> None:
            late.set()
            _shut(link)

        watchdog = threading.Timer(seconds, end)
        watchdog.daemon = True
        with self._lock:
            self._open.add(link)
        if self._stopped.is_set():
            _shut(link)
        watchdog.start()
        try:
            yield
        except Exception:
            if not late.is_set():
                raise
        finally:
            watchdog.cancel()
            with self._lock:
                self._open.discard(link)
            link.close()
        # Of a body without a length, its end cannot be told from having been cut off.
        if late.is_set():
            raise TimeoutError(f"not done within {seconds:g} s")


class OwnModel:
    """A model in this process."""

    def __init__(self, name: str, model: LanguageModel, tokenizer: Tokenizer, config: DistilConfig) -> None:
        self.name, self._config = name, config
        self._chat = ChatFormat(tokenizer)
        self._engine = BatchEngine(model, tokenizer, max_batch=min(64, config.at_once), max_queue=1024)

    def ask(self, messages: Sequence[Message], seed: int) -> Told:
        """As :meth:`Teacher.ask`."""
        config = self._config
        sampling = Sampling(
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p, seed=seed
        )
        try:
            request = self._engine.submit(self._chat.prompt(messages), sampling, deadline_s=config.timeout_seconds)
        except InputError as error:
            raise Refused(str(error)) from None
        outcome = request.wait()
        if outcome.finish_reason == "error":
            raise WorkFailed(outcome.error or "the teacher's engine has failed")
        if outcome.finish_reason in ("deadline", "cancelled"):
            raise NoAnswer(f"not done within {config.timeout_seconds:g} s")
        return Told(outcome.text, "", outcome.finish_reason == "stop", len(outcome.token_ids))

    def close(self) -> None:
        """End the engine's thread."""
        self._engine.close()


def is_address(teacher: str) -> bool:
    """Whether a teacher is an endpoint; if not, it is a directory."""
    return "://" in teacher


def _told(content: bytes) -> Told:
    """The answer in a reply. Raises ValueError, KeyError, TypeError or IndexError if there is none."""
    reply = json.loads(content)
    choice = reply["choices"][0]
    text, reasoning = (choice["message"].get(key) or "" for key in ("content", "reasoning_content"))
    if not isinstance(text, str) or not isinstance(reasoning, str):
        raise TypeError("content is no text")
    (text + reasoning).encode()  # a lone surrogate is no text
    usage = reply.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Told(text, reasoning, choice.get("finish_reason") == "stop", tokens if type(tokens) is int else None)


def _names(content: bytes) -> list[str]:
    return [str(one["id"]) for one in json.loads(content)["data"]]


def _complaint(content: bytes) -> str:
    """What an error's body says."""
    try:
        error = json.loads(content)["error"]
        return _short(str(error["message"] if isinstance(error, dict) else error))
    except (ValueError, KeyError, TypeError, RecursionError):
        return _short(content[:_LONGEST_WHY].decode(errors="replace"))


def _short(text: str) -> str:
    return " ".join(without_controls(text[:_LONGEST_WHY]).split())


def _seconds(value: str | None) -> float:
    """Of retry-after; a date counts as nothing."""
    try:
        return min(_LONGEST_WAIT, max(0.0, float(value or 0)))
    except ValueError:
        return 0.0


def _shut(link: socket.socket) -> None:
    """Wake whoever reads from a connection; the plain socket's, for TLS would first say goodbye."""
    with suppress(OSError):
        socket.socket.shutdown(link, socket.SHUT_RDWR)
