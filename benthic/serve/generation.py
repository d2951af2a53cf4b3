"""Requests at work in the engine, from asyncio's side: waited for, streamed, and given up when the client is gone."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from benthic.errors import InputError, WorkFailed
from benthic.inference.request import Completion, QueueFull, Request, Sampling, Token
from benthic.serve.errors import ApiError, bad, engine_failed, queue_full, shutting_down, too_late
from benthic.serve.grammar import GrammarConstraint
from benthic.serve.metrics import Metrics
from benthic.serve.models import Served

_AHEAD = 64
"""Tokens of a request's choices that wait to be sent, besides those that the engine keeps anyway."""
_WEIGHT = 0.1
"""Of the newest in a moving mean."""

log = logging.getLogger("benthic.serve")
_Result = TypeVar("_Result")
Receive = Callable[[], Awaitable[Any]]
Job = tuple[list[int], Sampling]
"""A prompt and its settings."""


class Generation:
    """The choices of one HTTP request. Whoever makes it calls :meth:`close` in the end.

    Args:
        served: the model.
        leave: gives back the places that were taken for the choices.
        metrics: where times are noted.
        arrived: when the request came, by ``time.monotonic()``.
        seconds: from then until it is given up.
        scope: of the prefix cache.
    """

    def __init__(
        self, served: Served, leave: Callable[[], None], metrics: Metrics, *, arrived: float, seconds: float, scope: str
    ) -> None:
        self._served, self._leave, self._metrics = served, leave, metrics
        self._arrived, self._seconds, self._scope = arrived, seconds, scope
        self.requests: list[Request] = []
        self._given_up = False

    async def start(self, prepare: Callable[[], Awaitable[Sequence[Job]]]) -> None:
        """Set the engine to work on what ``prepare`` gives: prompt and settings of each choice.

        Raises:
            ApiError: there is no time left; the engine takes no more, or refuses a prompt.
        """
        deadline = self._arrived + self._seconds
        try:
            async with asyncio.timeout_at(deadline):  # the loop's clock is time.monotonic()
                jobs = await prepare()
        except TimeoutError:
            raise too_late(self._seconds) from None
        try:
            for ids, sampling in jobs:
                if self._given_up:
                    raise shutting_down()
                left = deadline - time.monotonic()
                request = self._served.engine.submit(ids, sampling, deadline_s=left, scope=self._scope)
                self.requests.append(request)
                await asyncio.sleep(0)  # there may be thousands
        except (InputError, WorkFailed) as error:
            raise _refused(error) from error

    def close(self) -> None:
        """Cancel what is still at work, and give its places back."""
        self._leave()
        self.cancel()

    def cancel(self) -> None:
        """Let what is still at work, or about to be, end."""
        self._given_up = True
        for request in self.requests:
            request.cancel()

    async def completions(self) -> list[Completion]:
        """All outcomes. Raises ApiError if one of them failed."""
        await asyncio.gather(*[self._drain(request) for request in self.requests])
        return [self.outcome(request) for request in self.requests]

    async def tokens(self) -> AsyncIterator[tuple[int, Token | None]]:
        """Tokens of all choices as they come, with the number of the choice; None at a choice's end."""
        queue: asyncio.Queue[tuple[int, Token | None]] = asyncio.Queue(_AHEAD)

        async def feed(number: int, request: Request) -> None:
            try:
                async for token in self._watched(request):
                    await queue.put((number, token))
            except Exception:
                log.exception("a choice's tokens cannot be read")  # its outcome will say that it has none
            await queue.put((number, None))

        tasks = [asyncio.create_task(feed(number, request)) for number, request in enumerate(self.requests)]
        try:
            open_choices = len(tasks)
            while open_choices:
                item = await queue.get()
                open_choices -= item[1] is None
                yield item
        finally:
            for task in tasks:
                task.cancel()

    def outcome(self, request: Request) -> Completion:
        """The result of one that has ended. Raises ApiError if it failed."""
        result, constraint = request.result, request.sampling.constraint
        self._served.mean_seconds += _WEIGHT * (result.total_s - self._served.mean_seconds)
        if result.finish_reason == "error":
            log.error("engine: %s", result.error)
            raise engine_failed()
        if result.finish_reason == "deadline":
            raise too_late(self._seconds)
        if result.finish_reason == "cancelled":
            raise shutting_down()
        if isinstance(constraint, GrammarConstraint) and constraint.failed:
            raise bad("response_format: too complex", "response_format")
        return result

    async def _drain(self, request: Request) -> None:
        async for _ in self._watched(request):
            pass

    async def _watched(self, request: Request) -> AsyncIterator[Token]:
        name, last = self._served.name, None
        async for token in request:
            now = time.monotonic()
            if last is None:
                self._metrics.first_token.labels(name).observe(now - self._arrived)
            else:
                self._metrics.inter_token.labels(name).observe(now - last)
            last = now
            yield token


def _refused(error: InputError | WorkFailed) -> ApiError:
    if isinstance(error, InputError):
        return bad(str(error))
    if isinstance(error, QueueFull):  # of those that were given up a moment ago
        return queue_full(1)
    log.error("engine: %s", error)
    return engine_failed()


class ClientGone(Exception):
    """Nobody is there to read an answer."""


async def unless_disconnected(receive: Receive, work: Awaitable[_Result]) -> _Result:
    """The result of ``work``, which is cancelled if the client goes away. Raises ClientGone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
            with suppress(BaseException):
                await one


async def disconnected(receive: Receive) -> None:
    """Return once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
