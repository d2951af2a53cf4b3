"""Who holds which page of the cache: free pages, pages of one sequence, and chunks that several sequences share.

Only whole chunks of a prompt are shared. A chunk is known by a hash over itself and everything before it, so an equal
key means an equal beginning. A chunk that nobody uses stays until its room is needed; then the one unused for longest
goes. A sequence gives back its last chunk first, so that the end of a prompt goes before its beginning, without which
it could not be found.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Chunk:
    """Pages of one chunk of a prompt, of which nobody writes the transformer's layers any more.

    What MTP modules have of its last positions depends on tokens after it: it is that of whoever read the chunk, and
    may still be written. Drafts of others may be the worse for it, but nothing that is said.
    """

    key: bytes
    pages: tuple[int, ...]
    has_drafts: bool
    """Whether the MTP modules have read it too."""
    users: int = 1


class PagePool:
    """Hands out page numbers from 0 to ``pages`` - 1."""

    def __init__(self, pages: int) -> None:
        self.total, self.evictions = pages, 0
        self._free = list(range(pages - 1, -1, -1))
        self._chunks: dict[bytes, Chunk] = {}
        self._idle: OrderedDict[bytes, Chunk] = OrderedDict()
        self._idle_pages = 0

    @property
    def available(self) -> int:
        """Pages that :meth:`take` could hand out."""
        return len(self._free) + self._idle_pages

    @property
    def cached(self) -> int:
        """Pages of chunks that nobody uses."""
        return self._idle_pages

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.total - self.available

    def take(self, count: int) -> list[int] | None:
        """So many pages for one sequence alone; None, and nothing is taken, if there are too few."""
        if count > self.available:
            return None
        while len(self._free) < count:
            self._evict()
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Sequence[int]) -> None:
        """Pages of :meth:`take` that are no longer needed."""
        self._free += pages

    def share(self, key: bytes, pages: Sequence[int], *, has_drafts: bool) -> Chunk | None:
        """Turn a sequence's pages into a chunk that it uses; None if there is one already that is as good."""
        known = self._chunks.get(key)
        if known is not None and known.has_drafts >= has_drafts:
            return None
        if key in self._idle:
            self._drop(key)
        chunk = self._chunks[key] = Chunk(key, tuple(pages), has_drafts)
        return chunk

    def find(self, key: bytes, *, with_drafts: bool = False) -> Chunk | None:
        """The chunk of this key, which the caller now uses too; if need be, only one that MTP modules have read."""
        chunk = self._chunks.get(key)
        if chunk is None or (with_drafts and not chunk.has_drafts):
            return None
        if chunk.users == 0:
            del self._idle[key]
            self._idle_pages -= len(chunk.pages)
        chunk.users += 1
        return chunk

    def in_use(self, key: bytes) -> bool:
        """Whether somebody uses the chunk of this key, so that a further user takes no room."""
        return key in self._chunks and key not in self._idle

    def release(self, chunk: Chunk) -> None:
        """One user less; the last leaves the chunk for whoever comes, unless there is a better one by now."""
        chunk.users -= 1
        if chunk.users == 0 and self._chunks.get(chunk.key) is chunk:
            self._idle[chunk.key] = chunk
            self._idle_pages += len(chunk.pages)
        elif chunk.users == 0:
            self._free += chunk.pages

    def _evict(self) -> None:
        self._drop(next(iter(self._idle)))
        self.evictions += 1

    def _drop(self, key: bytes) -> None:
        """Forget a chunk that nobody uses."""
        chunk = self._idle.pop(key)
        del self._chunks[key]
        self._idle_pages -= len(chunk.pages)
        self._free += chunk.pages


def chain_key(before: bytes, ids: Sequence[int]) -> bytes:
    """Key of a chunk from that of the chunk before it and its own token ids."""
    return hashlib.blake2b(before + array("q", ids).tobytes(), digest_size=32).digest()


def root_key(scope: str) -> bytes:
    """What the first chunk of a prompt follows: prompts of different scopes share nothing."""
    return hashlib.blake2b(scope.encode(errors="surrogatepass"), digest_size=32).digest()
