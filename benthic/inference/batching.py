"""The engine as a service: requests from any thread, one thread that decodes them together."""

from collections.abc import Sequence

import torch

from benthic.config.schema import InferenceConfig
from benthic.data.tokenizer import Tokenizer
from benthic.inference.request import EngineStats, Request, Sampling
from benthic.model import LanguageModel


class BatchEngine:
    """Decodes many requests at once, in a thread of its own.

    A request gives the same tokens and log-probabilities alone, in any company, after preemption, and with or without
    its prompt's beginning in the cache.

    Args:
        model: stays on its device and in its precision.
        tokenizer: the one the model was trained with.
        defaults: settings of requests that give no others.
        cache_gib: memory of the latent cache, in GiB.
        max_batch: requests that run at once.
        max_queue: requests that may wait.
        max_draft: tokens the MTP modules may draft ahead; 0 switches them off.
        cache_dtype: of the cached latents; by default that of the weights.

    Raises:
        InputError: the memory holds not even one page.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, defaults: InferenceConfig | None = None, *,
        cache_gib: float = 1.0, max_batch: int = 16, max_queue: int = 256, max_draft: int = 3,
        cache_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        raise NotImplementedError

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
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """Figures of this moment; cheap, from any thread."""
        raise NotImplementedError

    @property
    def failed(self) -> str | None:
        """One line if the engine can work no more, for a health check."""
        raise NotImplementedError

    def close(self, *, drain_s: float = 0) -> None:
        """Take no more requests, give those at work so many seconds to end, cancel the rest, end the thread."""
        raise NotImplementedError
