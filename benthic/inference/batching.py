"""The engine as a service: requests from any thread, one thread that decodes them together."""

import atexit
import threading
import time
from collections.abc import Sequence
from typing import Any, Self, Unpack

from benthic.config.schema import InferenceConfig
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError, WorkFailed
from benthic.inference.limits import Options
from benthic.inference.request import EngineStats, QueueFull, Request, Sampling
from benthic.inference.scheduler import Scheduler
from benthic.model import LanguageModel


class BatchEngine:
    """Decodes many requests at once, in a thread of its own.

    A request gives the same tokens and log-probabilities alone, in any company, after preemption, and with or without
    its prompt's beginning in the cache.

    Args:
        model: stays on its device and in its precision.
        tokenizer: the one the model was trained with.
        defaults: settings of requests that give no others.
        max_queue: requests that may wait.
        **options: as :class:`~benthic.inference.scheduler.Scheduler` has them.

    Raises:
        InputError: a limit or an option is wrong, or the memory holds not even one page.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        defaults: InferenceConfig | None = None,
        *,
        max_queue: int = 256,
        **options: Unpack[Options],
    ) -> None:
        if max_queue < 1:
            raise InputError(f"max_queue={max_queue}: must be at least 1")
        self.config, self.tokenizer, self.defaults = model.config, tokenizer, defaults or InferenceConfig()
        self.max_queue = max_queue
        self._scheduler = Scheduler(model, tokenizer, **options)
        self._changed = threading.Condition()
        self._closing = False
        self._stop_at: float | None = None
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="benthic-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def settings(self, /, **sampling: Any) -> Sampling:
        """The defaults with ``sampling`` over them; raises ``InputError`` if a key or value is wrong."""
        return Sampling.checked(self.defaults, sampling)

    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, priority: int = 0, deadline_s: float | None = None,
        scope: str = "",
    ) -> Request:  # fmt: skip
        """Queue a prompt and return at once.

        Args:
            prompt_ids: what the completion follows.
            sampling: its settings; :meth:`Sampling.checked` makes them from defaults and a dictionary.
            priority: higher runs first; among equals, the earlier.
            deadline_s: seconds from now after which it ends with ``deadline``.
            scope: prompts share cached beginnings only within one scope, so that nobody learns from response times
                what others have asked.

        Raises:
            QueueFull: ``max_queue`` requests wait already.
            InputError: the prompt is empty, too long for the model or the cache, or has ids the model does not know.
            WorkFailed: the engine has been closed.
        """
        with self._changed:
            if self._failure or self._closing:
                raise WorkFailed(self._failure or "the engine has been closed")
            if self._scheduler.waiting >= self.max_queue:
                raise QueueFull(f"{self.max_queue} requests wait already; try again later")
            request = self._scheduler.submit(
                prompt_ids, sampling, priority=priority, deadline_s=deadline_s, scope=scope
            )
            self._changed.notify()
        return request

    def stats(self) -> EngineStats:
        """Figures of this moment; cheap, from any thread."""
        return self._scheduler.stats(self.max_queue)

    @property
    def failed(self) -> str | None:
        """One line if the engine can work no more, for a health check."""
        return self._failure

    def close(self, *, drain_s: float = 0) -> None:
        """Take no more requests, give those at work so many seconds to end, cancel the rest, end the thread."""
        with self._changed:
            self._closing = True
            self._stop_at = time.monotonic() + drain_s
            self._changed.notify()
        atexit.unregister(self.close)
        self._thread.join()

    def _run(self) -> None:
        scheduler = self._scheduler
        try:
            while self._next_step():
                scheduler.step()
        except BaseException as error:  # the thread's last words: nobody else would hear of it
            self._failure = f"the engine has failed: {type(error).__name__}: {' '.join(str(error).split())}"
        with self._changed:
            self._closing = True
            if self._failure:
                scheduler.end_all("error", self._failure)
            else:
                scheduler.end_all("cancelled")

    def _next_step(self) -> bool:
        """Wait for work; False when there will be none, or no time for it."""
        if self._scheduler.has_work and not self._closing:
            return True
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._scheduler.has_work)
            in_time = not self._closing or (self._stop_at is not None and time.monotonic() < self._stop_at)
            return self._scheduler.has_work and in_time
