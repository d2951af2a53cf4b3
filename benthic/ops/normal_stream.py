"""torch's stream of normal numbers from a seed, of which any stretch can be had without drawing what comes before it.

So a process that holds a part of a model draws that part alone, and has the weights that one process draws in order.
On the CPU torch fills a tensor in blocks of 16 numbers from as many words of a Mersenne twister (of 64 bits for fp64),
and draws the last 16 numbers once more if the blocks do not come out even.
"""

import torch
from torch import Tensor

from benthic.ops.mersenne import pass_over

_BLOCK = 16
_CHUNK = 2**18
_WORDS = {torch.float32: 1, torch.float64: 2}
"""That a number takes."""


class NormalStream:
    """What ``tensor.normal_(0, std, generator=generator)`` draws for one tensor after another, from a seed."""

    def __init__(self, seed: int, std: float, device: torch.device | str = "cpu") -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._std = std
        self._at = 0
        """Words from where the present tensor begins to where the generator is."""

    def fill(self, part: Tensor, start: int, numel: int) -> None:
        """Go on to the next tensor, of ``numel`` numbers; those from ``start`` on come into ``part``.

        Args:
            part: contiguous; empty, if the tensor is only to be passed over. Where it is not the whole tensor it must
                be on the CPU, and fp32 or fp64.

        Raises:
            ValueError: ``part`` is elsewhere or of another dtype, for which numbers are drawn in another way.
        """
        if part.numel() == numel:
            self._go_to(0)
            part.normal_(0.0, self._std, generator=self._generator)
            return
        if part.dtype not in _WORDS or part.device.type != "cpu":
            raise ValueError(f"parts are drawn in float32 or float64 on the CPU, not in {part.dtype} on {part.device}")
        if numel < _BLOCK:  # one by one, and the generator may keep one for the next such tensor: so never passed over
            self._go_to(0)
            part.view(-1).copy_(self._draw(part, numel)[start : start + part.numel()])
            return
        words, uneven = _WORDS[part.dtype], numel % _BLOCK > 0
        blocks = range(start - start % _BLOCK, min(start + part.numel(), numel - _BLOCK * uneven), _BLOCK)
        for first in range(blocks.start, blocks.stop, _CHUNK) if part.numel() else ():
            self._go_to(words * first)
            count = min(_CHUNK, blocks.start + _BLOCK * len(blocks) - first)
            self._at += words * count
            _copy(self._draw(part, count), first, part, start)
        if uneven and part.numel() and start + part.numel() > numel - _BLOCK:
            self._go_to(words * numel)
            self._at += words * _BLOCK
            _copy(self._draw(part, _BLOCK), numel - _BLOCK, part, start)
        self._at -= words * (numel + _BLOCK * uneven)

    def _draw(self, like: Tensor, count: int) -> Tensor:
        return like.new_empty(count).normal_(0.0, self._std, generator=self._generator)

    def _go_to(self, word: int) -> None:
        pass_over(self._generator, word - self._at)
        self._at = word


def _copy(numbers: Tensor, first: int, part: Tensor, start: int) -> None:
    """What numbers, of which ``first`` is the first one's place in a tensor, have in common with a part of it."""
    begin, end = max(first, start), min(first + len(numbers), start + part.numel())
    part.view(-1)[begin - start : end - start] = numbers[begin - first : end - first]
