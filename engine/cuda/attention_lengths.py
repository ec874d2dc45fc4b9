"""The few lengths that cuDNN's attention is given, so that its plans can be made in advance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

LADDER_FROM: Final = 1024
"""Shorter chunks gain too little by cuDNN."""
_STEPS_PER_OCTAVE: Final = 8


def padded_length(length: int) -> int:
    """The next length of the ladder: eight in each octave, so that padding is an eighth at the most."""
    octave = 1 << (length - 1).bit_length()
    step = max(octave // (2 * _STEPS_PER_OCTAVE), LADDER_FROM // _STEPS_PER_OCTAVE)
    return -(-length // step) * step


def ladder(max_length: int) -> list[int]:
    """What the lengths from `LADDER_FROM` to `max_length` are padded to."""
    lengths: list[int] = []
    length = LADDER_FROM
    while length <= max_length:
        lengths.append(padded_length(length))
        length = lengths[-1] + 1
    return lengths


def pieces(length: int, sizes: tuple[int, ...]) -> Iterator[slice]:
    """Cut `length`, a multiple of the last size, into pieces of these sizes, largest first."""
    start = 0
    for size in sizes:
        while length - start >= size:
            yield slice(start, start + size)
            start += size
