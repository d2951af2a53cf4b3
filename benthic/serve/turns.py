"""Turns in the event loop: of a crowd that comes at once, a few go on at a time.

All that is ready runs before the loop looks at anything else, so a thousand requests that each want a tenth of a
millisecond would hold up everybody, a look at /health among them, for all of it together.
"""

import asyncio

_AT_A_TIME = 4
"""Requests that go on between two looks at everything else that waits."""


class Turns:
    """Those who wait for :meth:`take` go on in order, a few in each round of the loop."""

    def __init__(self) -> None:
        self._going_on = asyncio.Semaphore(_AT_A_TIME)

    async def take(self) -> None:
        """Wait for one's turn; what is done until the next ``await`` is done in it."""
        async with self._going_on:
            await asyncio.sleep(0)
