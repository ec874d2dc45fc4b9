"""How long to wait before dialling again: exponential, with jitter, bounded."""

from __future__ import annotations

from random import Random
from typing import Final

JITTER: Final = 0.5
"""A delay is drawn from its last (1 - JITTER) to its whole length, so that nodes don't dial in step."""


class Backoff:
    """Delays from `initial_s`, doubling up to `max_s`."""

    def __init__(self, initial_s: float, max_s: float, rng: Random) -> None:
        self._initial_s = initial_s
        self._max_s = max_s
        self._rng = rng
        self._next_s = initial_s

    def next_delay_s(self) -> float:
        """The next delay; each call doubles what it draws from."""
        delay_s = self._next_s
        self._next_s = min(self._max_s, 2 * delay_s)
        return delay_s * (1 - JITTER * self._rng.random())

    def reset(self) -> None:
        """Start again from `initial_s`: the connection was good."""
        self._next_s = self._initial_s
