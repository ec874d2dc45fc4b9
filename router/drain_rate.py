"""How fast the queue of a model moves, measured while somebody waits, and how true forecasts of it were.

The rate is in seconds of nodes' work per second and prefill node: near 1 if work is foretold well and prefill
is what is scarce, less if decode is, or if other routers use the same nodes.
"""

from __future__ import annotations

import math
from typing import Final

_MEMORY: Final = 1.0 - 1.0 / 64
"""What one start later is left of what was measured before."""
_MIN_STARTS: Final = 8
"""Before so many requests have left the queue nothing is foretold."""
_STEP: Final = 0.1
_FIRST_RATIO: Final = 0.5
_LEAST_RATIO: Final = 0.02
_MOST_RATIO: Final = 2.0
_MAX_DOUBLINGS: Final = 3
"""Requests are told apart by size, in doublings of the mean work, so many up and down."""


class DrainRate:
    """See the module. Policies let small requests pass large ones, so how much of a foretold wait is sure is
    learned by size."""

    def __init__(self, low: float) -> None:
        """A share of `low` of the requests waits less than `at_best_s` says."""
        self._low = low
        self._low_ratios = [_FIRST_RATIO] * (2 * _MAX_DOUBLINGS + 1)
        self._mean_work_s = 0.0
        self._work_s = 0.0
        self._capacity_s = 0.0
        self._time_s = 0.0
        self._new_capacity_s = 0.0
        self._new_time_s = 0.0
        self._num_starts = 0
        self._weight = 0.0
        self._seen_s: float | None = None

    @property
    def mean_start_s(self) -> float:
        """Seconds between two starts, while somebody waits."""
        return self._time_s / self._weight if self._weight else 0.0

    def note_waiting(self, num_nodes: int, now_s: float) -> None:
        """Somebody waits, with so many nodes there since the last call."""
        if self._seen_s is not None:
            self._new_time_s += now_s - self._seen_s
            self._new_capacity_s += (now_s - self._seen_s) * num_nodes
        self._seen_s = now_s

    def note_empty(self) -> None:
        """Nobody waits any more."""
        self._seen_s = None

    def note_started(self, work_s: float) -> None:
        """Somebody that waited has been started."""
        self._work_s = self._work_s * _MEMORY + work_s
        self._capacity_s = self._capacity_s * _MEMORY + self._new_capacity_s
        self._time_s = self._time_s * _MEMORY + self._new_time_s
        self._new_capacity_s = self._new_time_s = 0.0
        self._weight = self._weight * _MEMORY + 1.0
        self._num_starts += 1
        self._mean_work_s += (work_s - self._mean_work_s) / min(self._num_starts, 64)

    def wait_s(self, work_ahead_s: float, num_nodes: int, now_s: float) -> float:
        """Seconds until so much work that waits has been started; 0 while nothing is known."""
        if self._num_starts < _MIN_STARTS or num_nodes < 1 or self._work_s <= 0.0:
            return 0.0
        silent_s = now_s - self._seen_s if self._seen_s is not None else 0.0
        capacity_s = self._capacity_s + self._new_capacity_s + silent_s * num_nodes
        return work_ahead_s * capacity_s / self._work_s / num_nodes

    def at_best_s(self, foretold_s: float, work_s: float) -> float:
        """What all but a share of `low` of requests of that size wait at least when so much is foretold."""
        return foretold_s * self._low_ratios[self._size(work_s)]

    def note_waited(self, actual_s: float, foretold_s: float, work_s: float) -> None:
        """What became of a forecast: the request was started after so long."""
        if foretold_s > 0.0:
            self._move_ratio(work_s, is_less=actual_s < self.at_best_s(foretold_s, work_s))

    def note_given_up(self, foretold_s: float, work_s: float) -> None:
        """The request had waited for as long as it might, and was not started."""
        if foretold_s > 0.0:
            self._move_ratio(work_s, is_less=False)

    def _move_ratio(self, work_s: float, *, is_less: bool) -> None:
        size = self._size(work_s)
        ratio = self._low_ratios[size] * math.exp(_STEP * (self._low - 1.0 if is_less else self._low))
        self._low_ratios[size] = min(max(ratio, _LEAST_RATIO), _MOST_RATIO)

    def _size(self, work_s: float) -> int:
        if self._mean_work_s <= 0.0 or work_s <= 0.0:
            return _MAX_DOUBLINGS
        doublings = round(math.log2(work_s / self._mean_work_s))
        return min(max(doublings, -_MAX_DOUBLINGS), _MAX_DOUBLINGS) + _MAX_DOUBLINGS
