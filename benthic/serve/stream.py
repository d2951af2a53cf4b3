"""Server-sent events to one client: given up when it goes away; a failure is never a clean end."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from benthic.serve.errors import ApiError, engine_failed
from benthic.serve.generation import disconnected

DONE = b"data: [DONE]\n\n"
ABORT = "benthic.abort"
"""Key of the scope under which the protocol leaves what closes the connection at once."""

_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""A proxy in front should pass events on as they come."""

log = logging.getLogger("benthic.serve")


def to_json(value: Any) -> str:
    """JSON as text that can be encoded, even if a string in it has half a surrogate pair."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"))
    return text


def event(value: Any) -> bytes:
    """One event."""
    return f"data: {to_json(value)}\n\n".encode()


class EventStream(Response):
    """Sends events until there are no more.

    Args:
        events: bytes to send; an exception becomes an error event, and the connection is broken off.
        on_end: called once, however it ends.
    """

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream", headers=_HEADERS)
        del self.headers["content-length"]
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        whole = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
            if not (whole.done() and whole.result()):
                scope.get(ABORT, lambda: None)()
        finally:
            self._on_end()
            for task in (whole, gone):
                task.cancel()
                with suppress(BaseException):
                    await task

    async def _send_all(self, send: Send) -> bool:
        """Whether all went well."""
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        try:
            await send(start)
            async for data in self._events:
                await send(_body(data))
            await send(_body(b"", more=False))
        except ApiError as error:
            await self._fail(send, error)
            return False
        except Exception as error:
            log.error("stream: %s", type(error).__name__)  # noqa: TRY400 - the message may hold what was asked
            await self._fail(send, engine_failed())
            return False
        return True

    async def _fail(self, send: Send, error: ApiError) -> None:
        await send(_body(event(error.body)))
        await asyncio.sleep(0.05)  # the event should be on its way before the connection is broken off


def _body(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}
