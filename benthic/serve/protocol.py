"""HTTP connections with what uvicorn leaves open: time and room for headers, an end for who does not read."""

import asyncio
import logging
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from benthic.config.schema import ServeConfig
from benthic.serve.stream import ABORT

_MOST_HEADERS = 64 << 10
_SEND_BUFFER = 256 << 10
"""Bytes that the system may hold for a client that does not read."""
_LINGER_S = 5.0
"""For the rest of a body that was refused: a client that is cut off while it sends would not see why."""

log = logging.getLogger("benthic.serve")


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol within limits, which :func:`protocol` sets."""

    header_seconds: float
    stall_seconds: float
    max_connections: int
    _deadline: asyncio.TimerHandle | None = None
    _headers_read: int | None = None
    """Bytes so far, while headers are expected."""
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for headers."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
            return
        if (sock := transport.get_extra_info("socket")) is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._nothing_expected()
        self._forget_stall()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """There is more to send than the client reads: see whether it goes on."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """It has."""
        self._forget_stall()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Read on, if there is room."""
        if self._headers_read is not None:
            if self._headers_read > _MOST_HEADERS:
                self._too_many_headers()
                return
            self._headers_read += len(data)
        if not self.transport.is_closing():
            super().data_received(data)

    def on_message_begin(self) -> None:
        """A request has begun."""
        super().on_message_begin()
        self._expect_headers()

    def on_headers_complete(self) -> None:
        """Its headers are there."""
        self._nothing_expected()
        self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required]
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Its body is there."""
        if self.cycle is not None and self.cycle.response_complete:
            self._nothing_expected()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Its answer is on the way."""
        super().on_response_complete()
        self._watch_reader()  # nobody else waits for what is left of it
        if self.cycle is not None and self.cycle.more_body:
            self._expect_within(_LINGER_S)

    def _expect_headers(self) -> None:
        self._expect_within(self.header_seconds)
        self._headers_read = 0

    def _expect_within(self, seconds: float) -> None:
        self._nothing_expected()
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _nothing_expected(self) -> None:
        self._headers_read = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _watch_reader(self) -> None:
        """Break off the connection if what waits to be sent does not get less for a while."""
        self._forget_stall()
        if left := self.transport.get_write_buffer_size():
            self._stall = self.loop.call_later(self.stall_seconds, self._still_unread, left)

    def _still_unread(self, before: int) -> None:
        if self.transport.get_write_buffer_size() != before:
            self._watch_reader()
            return
        log.info("a client stopped reading; its connection is closed and what it asked for cancelled")
        self.transport.abort()

    def _forget_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _too_many_headers(self) -> None:
        self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n")
        self.transport.close()


def protocol(config: ServeConfig) -> type[LimitedProtocol]:
    """The class, for uvicorn to make connections of."""
    limits = {name: getattr(config, name) for name in ("header_seconds", "stall_seconds", "max_connections")}
    return type("Protocol", (LimitedProtocol,), limits)
