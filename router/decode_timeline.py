"""When what the decode nodes hold is expected to be free again, so that their load can be foretold.

Expected ends fall into slices of time, so that an entry costs the same however many there are. What should
have ended and has not is taken to end now.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_SLICE_S: Final = 0.25
_NUM_SLICES: Final = 512
"""What ends later than two minutes from now is taken to end then."""

Ints = NDArray[np.int64]


class DecodeTimeline:
    """Sequences by their serial, with when each is expected to end and the KV room that it has. `num_running`
    and `num_tokens` are of all together."""

    def __init__(self) -> None:
        self.num_running = 0
        self.num_tokens = 0
        self._ends: dict[int, tuple[int, int]] = {}
        self._sequences: Ints = np.zeros(_NUM_SLICES, np.int64)
        self._tokens: Ints = np.zeros(_NUM_SLICES, np.int64)
        self._first = 0

    def add(self, serial: int, num_tokens: int, end_s: float, now_s: float) -> None:
        """A sequence was placed."""
        assert serial not in self._ends
        self._advance(now_s)
        slice_ = min(max(int(end_s / _SLICE_S), self._first), self._first + _NUM_SLICES - 1)
        self._ends[serial] = slice_, num_tokens
        self._sequences[slice_ % _NUM_SLICES] += 1
        self._tokens[slice_ % _NUM_SLICES] += num_tokens
        self.num_running += 1
        self.num_tokens += num_tokens

    def remove(self, serial: int) -> None:
        """It has ended, if it is here."""
        end = self._ends.pop(serial, None)
        if end is None:
            return
        slice_, num_tokens = max(end[0], self._first), end[1]
        self._sequences[slice_ % _NUM_SLICES] -= 1
        self._tokens[slice_ % _NUM_SLICES] -= num_tokens
        self.num_running -= 1
        self.num_tokens -= num_tokens

    def left_at(self, time_s: float, now_s: float) -> tuple[int, int]:
        """Of what runs now: how many sequences still will at `time_s`, with how many tokens of room."""
        self._advance(now_s)
        num_over = min(max(int(time_s / _SLICE_S) - self._first, 0), _NUM_SLICES)
        order = (np.arange(num_over) + self._first) % _NUM_SLICES
        ended, tokens = int(self._sequences[order].sum()), int(self._tokens[order].sum())
        return self.num_running - ended, self.num_tokens - tokens

    def free_in_s(self, num_sequences: float, num_tokens: float, now_s: float) -> float:
        """Seconds until so many sequences have ended, and so many tokens of room are free again; infinite if
        not even the end of all that runs is enough."""
        self._advance(now_s)
        if num_sequences <= 0 and num_tokens <= 0:
            return 0.0
        order = (np.arange(_NUM_SLICES) + self._first) % _NUM_SLICES
        sequences, tokens = self._sequences[order].cumsum(), self._tokens[order].cumsum()
        last = max(int(np.searchsorted(sequences, num_sequences)), int(np.searchsorted(tokens, num_tokens)))
        return last * _SLICE_S if last < _NUM_SLICES else float("inf")

    def _advance(self, now_s: float) -> None:
        """Let slices that are over flow into the one that is now."""
        now = int(now_s / _SLICE_S)
        if now <= self._first:
            return
        over = (np.arange(min(now - self._first, _NUM_SLICES)) + self._first) % _NUM_SLICES
        for column in (self._sequences, self._tokens):
            total = column[over].sum()
            column[over] = 0
            column[now % _NUM_SLICES] += total
        self._first = now
