"""The engine from Python: prompts in, text out, on the caller's own thread.

It is the scheduler of the batching engine with nobody else's requests in it: a call steps until its text is there.
"""

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Unpack

from benthic.config.schema import InferenceConfig
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError, WorkFailed
from benthic.inference.limits import Options
from benthic.inference.request import Completion, EngineStats, Request, Sampling
from benthic.inference.scheduler import Scheduler
from benthic.model import LanguageModel

Prompt = str | Sequence[int]
"""Text that a document begins with, or token ids of anything, such as a conversation."""


class Engine:
    """A model that completes prompts.

    What prompts have in common with earlier ones is not read again. An engine may be used from several threads; they
    take turns.

    Args:
        model: stays on its device and in its precision.
        tokenizer: the one the model was trained with.
        defaults: settings of requests that give no others.
        **options: as :class:`~benthic.inference.scheduler.Scheduler` has them.

    Raises:
        InputError: an option is wrong, or the memory holds not even one page.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        defaults: InferenceConfig | None = None,
        **options: Unpack[Options],
    ) -> None:
        self.model, self.config, self.tokenizer = model.eval(), model.config, tokenizer
        self.defaults = defaults or InferenceConfig()
        self._scheduler = Scheduler(model, tokenizer, **options)
        self._turn = threading.Lock()

    def generate(self, prompts: str | Sequence[Prompt], **sampling: Any) -> list[Completion]:
        """Complete each prompt by itself: the outcome depends on nothing but prompt, settings and seed.

        Args:
            prompts: one text, or a list of texts and of lists of token ids.
            **sampling: fields of :class:`Sampling` that differ from the defaults.

        Raises:
            InputError: a setting is wrong, or a prompt is empty or too long.
            WorkFailed: the model's logits are not finite.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        settings = self.settings(**sampling)
        if settings.constraint is not None and len(prompts) > 1:
            raise InputError("constraint: it serves one prompt only")
        all_ids = [self._checked(prompt, settings) for prompt in prompts]
        requests: list[Request] = []
        with self._cancelling(requests):
            requests += [self._scheduler.submit(ids, settings) for ids in all_ids]
            for request in requests:
                while not request.done:
                    self._step()
        return [_outcome(request) for request in requests]

    def stream(self, prompt: Prompt, **sampling: Any) -> Generator[str, None, Completion]:
        """Complete a prompt piece by piece; the pieces joined are the text of the completion that is returned.

        Args:
            prompt: text or token ids.
            **sampling: as for :meth:`generate`.

        Raises:
            InputError: as :meth:`generate`, at the call.
            WorkFailed: the model's logits are not finite; where the pieces are read.
        """
        settings = self.settings(**sampling)
        return self._stream(self._checked(prompt, settings), settings)

    def settings(self, /, **sampling: Any) -> Sampling:
        """The defaults with ``sampling`` over them; raises ``InputError`` if a key or value is wrong."""
        return Sampling.checked(self.defaults, sampling)

    def stats(self) -> EngineStats:
        """Figures of the engine so far."""
        return self._scheduler.stats()

    def _stream(self, ids: list[int], settings: Sampling) -> Generator[str, None, Completion]:
        requests: list[Request] = []
        with self._cancelling(requests):
            request = self._scheduler.submit(ids, settings)
            requests.append(request)
            seen = 0
            while not request.done or request.available(seen):
                tokens = request.available(seen)
                seen += len(tokens)
                yield from (token.text for token in tokens if token.text)
                if not request.done:
                    self._step()
        return _outcome(request)

    def _step(self) -> None:
        with self._turn:
            try:
                if self._scheduler.has_work:
                    self._scheduler.step()
            except BaseException as error:  # Ctrl-C too: a step broken off in the middle leaves nothing to go on from
                self._scheduler.end_all("error", f"broken off: {type(error).__name__}")
                raise

    @contextmanager
    def _cancelling(self, requests: list[Request]) -> Iterator[None]:
        """Whatever ends the block, none of its requests goes on."""
        try:
            yield
        finally:
            for request in requests:
                request.cancel()

    def _checked(self, prompt: Prompt, settings: Sampling) -> list[int]:
        """The prompt's ids, if it can run."""
        ids = list(self._ids(prompt))
        self._scheduler.check(ids, settings)
        return ids

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, str) and prompt:
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        return list(prompt) if not isinstance(prompt, str) else []


def _outcome(request: Request) -> Completion:
    if request.result.finish_reason == "error":
        raise WorkFailed(request.result.error or "the engine has failed")
    return request.result
