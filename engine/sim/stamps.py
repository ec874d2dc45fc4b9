"""What the simulated engine writes as KV: stamps that depend on every token up to their position.

A stamp is 8 bytes, a function of the tokens ``[0, position]``, the layer, and key or value. A KV that
went to the wrong slot, arrived twice, or belongs to another prompt therefore shows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

UInt64s: TypeAlias = NDArray[np.uint64]

STAMP_BYTES: Final = 8
_RADIX: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1


class PrefixStamps:
    """Computes stamps for positions up to `max_tokens` and layers ``[0, num_layers)``."""

    def __init__(self, max_tokens: int, num_layers: int) -> None:
        powers = np.full(max_tokens, _RADIX, dtype=np.uint64)
        powers[0] = 1
        self._powers = np.multiply.accumulate(powers)
        self._power_ints: list[int] = self._powers.tolist()
        salts = [_mix_int(index + 1) for index in range(2 * num_layers)]
        self._salts = np.array(salts, dtype=np.uint64).reshape(num_layers, 2, 1)

    def prefix_sums(self, token_ids: Sequence[int], start: int = 0, sum_before: int = 0) -> UInt64s:
        """Rolling hash at each of the positions ``[start, start + len(token_ids))``.

        `sum_before` is the one at position ``start - 1``.
        """
        terms = np.asarray(token_ids, dtype=np.uint64) + np.uint64(1)
        sums = np.cumsum(terms * self._powers[start : start + len(token_ids)], dtype=np.uint64)
        return sums + np.uint64(sum_before)

    def next_sum(self, token_id: int, position: int, sum_before: int) -> int:
        """The rolling hash at `position`: `prefix_sums` for a single token."""
        return (sum_before + (token_id + 1) * self._power_ints[position]) & _MASK

    def stamps(self, prefix_sums: UInt64s) -> UInt64s:
        """Stamps ``[num_layers, 2, len(prefix_sums)]``."""
        return _mix(prefix_sums[None, None, :] ^ self._salts)


def stream_of(prompt_hash: int, seed: int) -> int:
    """Names the stream of tokens that the simulated model draws for one prompt and seed."""
    return prompt_hash ^ _mix_int(seed)


def draw_token(stream: int, position: int, vocab_size: int, forbidden: Collection[int] = ()) -> int | None:
    """The simulated model's token at `position`: never 0, which is the end of sequence, and none of the
    `forbidden` ones, of which it takes the next instead; None if they are all that there is."""
    drawn = _mix_int(stream ^ (position * _RADIX))
    for offset in range(min(vocab_size - 1, len(forbidden) + 1)):
        token_id = 1 + (drawn + offset) % (vocab_size - 1)
        if token_id not in forbidden:
            return token_id
    return None


def _mix(values: UInt64s) -> UInt64s:
    """The finaliser of SplitMix64, element by element. Source: Steele, Lea, Flood, OOPSLA 2014."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_int(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
