"""The virtual clock: what happens next, in order of time and, at one time, in order of entry."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class EventQueue:
    """`now_s` jumps from event to event."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_entered = 0

    def at(self, time_s: float, happens: Callable[[], None]) -> None:
        """Have something happen then, which is not before now."""
        self._num_entered += 1
        heappush(self._events, (max(time_s, self.now_s), self._num_entered, happens))

    @property
    def next_s(self) -> float | None:
        """When the next event is; None: there is none."""
        return self._events[0][0] if self._events else None

    def step(self) -> None:
        """Let the next event happen."""
        self.now_s, _, happens = heappop(self._events)
        happens()
