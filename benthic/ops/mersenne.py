"""torch's generator of random words on the CPU, a Mersenne twister (MT19937), set any number of words further on.

Each word is a sum over GF(2) of bits of earlier ones, so that of successive words the ones ``n`` further on are sums
too: of those that the polynomial t^n has, modulo the characteristic one of degree 19937 (Haramoto, Matsumoto,
Nishimura, Panneton and L'Ecuyer, Efficient Jump Ahead for F2-Linear Random Number Generators, 2008). A jump takes a
tenth of a second, however far it goes.

Polynomials over GF(2) are integers: bit i is the coefficient of t^i.
"""

from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

_SIZE, _MIDDLE, _SPLIT, _MATRIX = 624, 397, 31, 0x9908B0DF
"""n, m, r and a of MT19937 (Matsumoto and Nishimura, 1998): words of the state are x_0 to x_(n-1)."""
_DEGREE = 32 * _SIZE - _SPLIT
_STATE, _LEFT, _NEXT = slice(24, 24 + 8 * _SIZE), slice(8, 12), slice(16, 24)
"""Where a generator's state, as bytes, has the twister's words, each in 64 bits; how many are left; which is next."""
_FARTHEST_DRAWN = 2**25
"""Words that are drawn in less time than a jump takes."""
_BUFFER = 2**16

_Words = NDArray[np.uint32]


def pass_over(generator: torch.Generator, words: int) -> None:
    """Leave a CPU generator as it is after so many words of 32 bits."""
    if words > _FARTHEST_DRAWN:
        jump(generator, words)
        return
    buffer = torch.empty(min(words, _BUFFER), dtype=torch.int32)
    while words:
        buffer[:words].random_(generator=generator)
        words -= min(words, _BUFFER)


def jump(generator: torch.Generator, words: int) -> None:
    """The same for at least one word, without drawing them."""
    content = generator.get_state()
    state = content.numpy()
    left, following = state[_LEFT].view(np.int32), state[_NEXT].view(np.uint64)
    used = _SIZE + 1 - int(left[0])
    # So that one word of the state is used, as the generator wants it; of that only the first bit is right, as it must.
    state[_STATE].view(np.uint64)[:] = _ahead(state[_STATE].view(np.uint64).astype(np.uint32), used + words - 1)
    left[0], following[0] = _SIZE, 1
    generator.set_state(content)


def _ahead(x: _Words, steps: int) -> _Words:
    """The state whose first word is so many words further on."""
    words = _following(x, _DEGREE)
    found = np.zeros(_SIZE, np.uint32)
    for place in _exponents(_power(steps)):
        found ^= words[place : place + _SIZE]
    return found


def _following(x: _Words, count: int) -> _Words:
    """A state and at least ``count`` words after it."""
    at_once = _SIZE - _MIDDLE
    words = np.empty(_SIZE + count + at_once, np.uint32)
    words[:_SIZE] = x
    for k in range(0, count, at_once):
        upper, lower = words[k : k + at_once] >> _SPLIT << _SPLIT, words[k + 1 : k + 1 + at_once] & (2**_SPLIT - 1)
        mixed = (upper | lower) >> 1 ^ (lower & 1) * np.uint32(_MATRIX)
        words[k + _SIZE : k + _SIZE + at_once] = words[k + _MIDDLE : k + _SIZE] ^ mixed
    return words


@lru_cache(maxsize=256)
def _power(exponent: int) -> int:
    """t^exponent modulo the characteristic polynomial."""
    found = 1
    for bit in f"{exponent:b}":
        found = _remainder(_square(found) << int(bit))
    return found


def _square(polynomial: int) -> int:
    """A zero between any two coefficients: binary digits, read with base 4."""
    return int(f"{polynomial:b}", 4)


def _remainder(polynomial: int) -> int:
    lower_terms = _exponents(_characteristic())[:-1]
    while high := polynomial >> _DEGREE:
        polynomial ^= high << _DEGREE
        for exponent in lower_terms:
            polynomial ^= high << exponent
    return polynomial


@cache
def _characteristic() -> int:
    """As in the appendix of Matsumoto and Nishimura: (t^n + t^m)^(w-r) (t^(n-1) + t^(m-1))^r + ..., with w - r = 1."""
    p, q = 1 << _SIZE | 1 << _MIDDLE, 1 << _SIZE - 1 | 1 << _MIDDLE - 1
    found = _MATRIX >> _SPLIT & 1
    product = p
    for i in reversed(range(_SPLIT)):
        found ^= product * (_MATRIX >> i & 1)
        product = _product(product, q)
    return found ^ product


def _product(one: int, other: int) -> int:
    found = 0
    for exponent in _exponents(other):
        found ^= one << exponent
    return found


def _exponents(polynomial: int) -> list[int]:
    return [place for place, bit in enumerate(reversed(f"{polynomial:b}")) if bit == "1"]
