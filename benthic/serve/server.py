"""The process: models and socket first, then requests until it is told to stop, then those at work to their end."""

import contextlib
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from benthic.config.schema import ServeConfig
from benthic.errors import InputError, MissingExtra

try:
    import llguidance  # noqa: F401 - missed now rather than at the first request that needs it
    import prometheus_client  # noqa: F401
    import uvicorn

    from benthic.serve.app import Application
    from benthic.serve.protocol import protocol
except ImportError as error:
    raise MissingExtra(error.name or "a library of the server", "serve") from None

from benthic.serve.access import Keys, State, is_local
from benthic.serve.models import load_models

_KEY_VARIABLE = "BENTHIC_API_KEY"
_BACKLOG = 2048
"""Connections that the system holds until they are accepted."""
_ACCEPTED_AT_ONCE = 8
"""Connections taken in before those that are open get their turn again."""
_SWITCH_S = 0.0002
"""After so long the engine's thread lets others run. The event loop asks again after each read from a socket, so that
Python's own 5 ms add up to tenths of a second where a thousand requests come at once.
"""
_CLOSING_S = 5
"""For requests to end that are told so."""
_COLLECT_AFTER = (2_000, 5, 1_000)
"""Objects, and collections of the next younger generation, before Python collects. Going through all of the objects of
a thousand requests would hold up everybody, so the oldest are left for a quiet moment, unless there never is one.
"""


def serve(paths: Mapping[str, Path], config: ServeConfig, key: str | None = None) -> None:
    """Serve models until SIGTERM or Ctrl-C.

    Args:
        paths: directories by the name that requests give.
        config: where, for whom, how much.
        key: an API key besides those of ``config.api_key_file`` and of the environment's ``BENTHIC_API_KEY``.

    Raises:
        InputError: an address is wrong or taken, or would be open to others without a key; a model cannot be loaded.
    """
    keys = read_keys(config, key)
    _refuse_open_door(config, keys)
    sys.setswitchinterval(_SWITCH_S)
    _log_to_stderr()
    with contextlib.closing(_bind(config)) as sock:
        models = load_models(paths, config)
        state = State()
        app = Application(models, config, keys, state)
        gc.collect()
        gc.freeze()  # what is there stays
        gc.set_threshold(*_COLLECT_AFTER)
        try:
            _Server(app, config, state, list(paths), sock).run([sock])
        finally:
            app.close()
            for served in models:
                served.close()


def read_keys(config: ServeConfig, key: str | None) -> Keys:
    """All API keys there are.

    Raises:
        InputError: the file holds none, or a key is empty.
        OSError: the file cannot be read.
    """
    found = [] if key is None else [key]
    if _KEY_VARIABLE in os.environ:
        found.append(os.environ[_KEY_VARIABLE])
    if config.api_key_file is not None:
        text = Path(config.api_key_file).read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines()]
        found += (of_file := [line for line in lines if line and not line.startswith("#")])
        if not of_file:
            raise InputError(f"{config.api_key_file}: holds no API key")
    if not all(one.strip() for one in found):
        raise InputError("an API key must not be empty")
    return Keys(one.strip() for one in found)


def _refuse_open_door(config: ServeConfig, keys: Keys) -> None:
    if not (keys or is_local(config.host) or config.public_without_key):
        raise InputError(
            f"serve.host = {config.host!r}: others can reach it, and there is no API key; give --api-key or "
            "serve.api_key_file, or allow it with --set serve.public_without_key=true"
        )


def _bind(config: ServeConfig) -> socket.socket:
    """A socket at the address, not listening yet: until the models are loaded, connections are refused."""
    try:
        found = socket.getaddrinfo(config.host.strip("[]"), config.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _wrong_address(config, error.strerror) from None
    except UnicodeError:
        raise _wrong_address(config, "not a name that a host can have") from None
    family, kind, number, _, address = found[0]
    sock = socket.socket(family, kind, number)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _wrong_address(config, error.strerror) from None
    return sock


def _wrong_address(config: ServeConfig, why: str | None) -> InputError:
    return InputError(f"serve.host = {config.host}, serve.port = {config.port}: {why}")


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("benthic.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


class _Server(uvicorn.Server):
    """uvicorn's server, which goes on answering 503 while it drains, and ends with status 0."""

    def __init__(
        self, app: Application, config: ServeConfig, state: State, names: list[str], sock: socket.socket
    ) -> None:
        super().__init__(uvicorn.Config(
            app, http=protocol(config), loop="asyncio", ws="none", lifespan="off", log_config=None,
            access_log=False, server_header=False, proxy_headers=False, backlog=_ACCEPTED_AT_ONCE,
            timeout_graceful_shutdown=_CLOSING_S,
        ))  # fmt: skip
        self._app, self._state, self._names, self._sock = app, state, names, sock
        self._drain_s = config.drain_seconds
        self._give_up_at = float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # uvicorn has one number for what the system holds and for what is accepted in a row; here they differ.
        self._sock.listen(_BACKLOG)
        host, port, *_ = self._sock.getsockname()
        host = f"[{host}]" if ":" in host else host
        print(f"serving {', '.join(self._names)} at http://{host}:{port}", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the drain, a second one ends it."""
        if self._state.draining:
            self.should_exit = self.force_exit = True
        self._state.draining = True
        self._give_up_at = time.monotonic() + self._drain_s

    async def on_tick(self, counter: int) -> bool:
        if self._state.draining and time.monotonic() > self._give_up_at:
            self._app.give_up()
        if self._state.draining and (not self._state.active or time.monotonic() > self._give_up_at + _CLOSING_S):
            self.should_exit = True
        if not self._state.active and gc.get_count()[2]:
            gc.collect()
        return await super().on_tick(counter)
