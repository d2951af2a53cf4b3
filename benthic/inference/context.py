"""What a conversation keeps from one turn to the next, so that only new text is read."""

from collections.abc import Sequence

from benthic.inference.cache import LatentCache


class Context:
    """A cache and the tokens whose latents it holds."""

    def __init__(self, cache: LatentCache) -> None:
        self.cache = cache
        self._ids: list[int] = []

    def keep_common_beginning(self, ids: Sequence[int]) -> list[int]:
        """Forget what does not begin like ``ids``; return the rest of them, at least the last, still to be read."""
        limit = min(len(self._ids), len(ids) - 1)
        common = next((i for i in range(limit) if self._ids[i] != ids[i]), limit)
        self.cache.truncate(common)
        del self._ids[common:]
        return list(ids[common:])

    def have_read(self, ids: Sequence[int]) -> None:
        """End a step: the latents of ``ids`` have been appended to every layer."""
        self.cache.advance(len(ids))
        self._ids += ids
