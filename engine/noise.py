"""Sampling noise as a pure function of (seed, position, token id): no generator, no state, no batch.

Each number is the SplitMix64 finaliser of a counter. Source: Steele, Lea, Flood, "Fast Splittable
Pseudorandom Number Generators", OOPSLA 2014; Gumbel 1954 for the max trick that uses the noise.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

_INCREMENT: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB
_MASK: Final = (1 << 64) - 1


def stream_key(seed: int, position: int) -> int:
    """64 bits that name the draw at `position` of the stream `seed`, as a signed integer."""
    return _signed(_mix_int(_mix_int(seed * _INCREMENT + 1) + position * _INCREMENT))


def gumbel_noise(key: int, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise for each token id (int64, any shape), in float64."""
    bits = _mix(token_ids * _signed(_INCREMENT) + key)
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52
    return uniform.log_().neg_().log_().neg_()


def _mix(values: Tensor) -> Tensor:
    values = (values ^ _shift_right(values, 30)) * _signed(_FIRST)
    values = (values ^ _shift_right(values, 27)) * _signed(_SECOND)
    return values ^ _shift_right(values, 31)


def _shift_right(values: Tensor, num_bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (values >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _mix_int(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    """The same 64 bits as two's complement, which is what torch's int64 takes."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value
