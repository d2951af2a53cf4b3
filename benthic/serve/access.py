"""The door, in front of all routes: request ids, API keys, host names, draining, errors in one shape, the log.

What may pass without a key is listed; everything else, known or not, needs one. So no way of writing a path leads
around it.
"""

import hashlib
import hmac
import ipaddress
import logging
import secrets
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benthic.serve.errors import ApiError, engine_failed, shutting_down
from benthic.serve.turns import Turns

log = logging.getLogger("benthic.serve")

PROBES = frozenset({"/health", "/ready"})
"""They tell one word, are asked often, and go on while the server drains."""
SCOPE_OF_CACHE = "benthic.cache_scope"
"""Key of the ASGI scope: what keeps one caller's cached prompts from another."""
ARRIVED = "benthic.arrived"
"""Key of the ASGI scope: when the request's headers were there, by ``time.monotonic()``."""
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


@dataclass
class State:
    """Whether the server takes requests, and how many it has."""

    draining: bool = False
    active: int = 0


class Keys:
    """API keys, of which only hashes are kept. None at all lets everybody in."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, given: bytes) -> str | None:
        """A name for the key that was given; None if there is no such key. Takes as long for any that is wrong."""
        digest, found = _digest(given), None
        for known in self._digests:
            if hmac.compare_digest(digest, known):
                found = known.hex()
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Door:
    """ASGI middleware around the whole application.

    Args:
        app: the application.
        state: shared with whoever begins to drain.
        keys: API keys.
        open_paths: paths besides the probes that need none: files of the page.
        hosts: names that requests may call this server by, besides local ones; None allows all. A page from elsewhere
            that has its name point here would otherwise be let in by the user's browser.
        log_requests: write a line for each.
        count: called with the status of each response.
    """

    def __init__(
        self, app: ASGIApp, state: State, keys: Keys, *, open_paths: Iterable[str], hosts: Iterable[str] | None,
        log_requests: bool, count: Any,
    ) -> None:  # fmt: skip
        self._app, self._state, self._keys = app, state, keys
        self._open = PROBES | set(open_paths)
        self._hosts = None if hosts is None else frozenset(name.lower() for name in hosts)
        self._log_requests, self._count = log_requests, count
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        assert scope["type"] == "http", scope["type"]
        exchange = _Exchange(send)
        probe = scope["path"] in PROBES
        counted = not probe and not self._state.draining  # those that are refused do not put off the end
        self._state.active += counted
        scope[ARRIVED] = begun = time.monotonic()
        try:
            if not probe:
                await self._turns.take()
            await self._answer(scope, receive, exchange)
        finally:
            self._state.active -= counted
            self._count(exchange.status)
            if self._log_requests and not probe:
                log.info(
                    "%s %s %s %d %.3fs", exchange.id, scope["method"], ascii(scope["path"])[1:-1][:200],
                    exchange.status, time.monotonic() - begun,
                )  # fmt: skip

    async def _answer(self, scope: Scope, receive: Receive, exchange: "_Exchange") -> None:
        try:
            self._admit(scope)
            await self._app(scope, receive, exchange.send)
        except ApiError as error:
            await exchange.fail(error, scope, receive)
        except Exception as error:
            # Not its message: that may hold what was asked.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s: %s\n%s", exchange.id, type(error).__name__, where)  # noqa: TRY400
            await exchange.fail(engine_failed(), scope, receive)

    def _admit(self, scope: Scope) -> None:
        headers = dict(reversed(scope["headers"]))  # of several alike, the first
        name = _name(headers.get(b"host", b""))
        if self._hosts is not None and name not in self._hosts and not is_local(name):
            message = "this server is not called by that name; serve.hosts allows further names"
            raise ApiError(403, message, code="unknown_host")
        scope[SCOPE_OF_CACHE] = ""
        if scope["path"] in self._open:
            return
        if self._keys:
            key = self._keys.find(_given_key(headers.get(b"authorization", b"")))
            if key is None:
                challenge = {"www-authenticate": "Bearer"}
                raise ApiError(401, "no valid API key was given", code="invalid_api_key", headers=challenge)
            scope[SCOPE_OF_CACHE] = key
        if self._state.draining and scope["path"] != "/metrics":
            raise shutting_down()


class _Exchange:
    """One request's response on its way out."""

    def __init__(self, send: Send) -> None:
        self.id = f"req_{secrets.token_hex(12)}"
        self.status = 0
        """0 before it has begun."""
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", self.id.encode()), *_HEADERS]
        await self._send(message)

    async def fail(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        if not self.status:
            await error.response()(scope, receive, self.send)


def _given_key(authorization: bytes) -> bytes:
    kind, _, key = authorization.partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else b""


def _name(host: bytes) -> str:
    """The name in a Host header, without the port."""
    text = host.decode("latin-1").lower()
    name, colon, port = text.rpartition(":")
    return name if colon and port.isdigit() else text


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address that is listened on."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
