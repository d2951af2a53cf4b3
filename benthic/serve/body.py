"""Reading what clients send: never more than allowed, of one or of all together, and not for longer than allowed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from benthic.serve.errors import ApiError, unavailable
from benthic.serve.generation import ClientGone

_TOGETHER = 16
"""Bodies of the largest size that are held at once, until their prompts are tokens; more are refused."""


class Bodies:
    """Reads bodies of at most ``limit`` bytes within ``seconds``."""

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit, self._seconds = limit, seconds
        self._held = 0

    @asynccontextmanager
    async def of(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a JSON request, which counts as held while the context is.

        Raises:
            ApiError: 415 another type; 413 too large; 408 too slow; 503 too many at once.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "content-type must be application/json", code="unsupported_media_type")
        if int(request.headers.get("content-length") or 0) > self._limit:
            raise self._too_large()
        pieces: list[bytes] = []
        try:
            try:
                async with asyncio.timeout(self._seconds):
                    await self._read(request, pieces)
            except TimeoutError:
                raise ApiError(408, f"the body did not arrive within {self._seconds:g} s", code="timeout") from None
            except ClientDisconnect:
                raise ClientGone from None
            body = b"".join(pieces)
            pieces[:] = [body]  # lest it be there twice
            yield body
        finally:
            self._held -= sum(map(len, pieces))

    async def _read(self, request: Request, pieces: list[bytes]) -> None:
        held = 0
        async for piece in request.stream():
            held += len(piece)
            if held > self._limit:
                raise self._too_large()
            if self._held + len(piece) > _TOGETHER * self._limit:
                raise unavailable("too many large requests at once", 1)
            self._held += len(piece)
            pieces.append(piece)

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self._limit} bytes"
        return ApiError(413, message, code="request_too_large", headers={"x-should-retry": "false"})
