"""The classes of requests: what share of the cluster each gets, and how many of it may wait."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Final

from kvrelay.core.errors import ConfigError
from kvrelay.core.service_terms import Priority

_WEIGHTS: Final = {Priority.HIGH: 16.0, Priority.NORMAL: 4.0, Priority.LOW: 1.0}
_MAX_WEIGHT: Final = 1e6


@dataclass(frozen=True, slots=True)
class PriorityClass:
    """While requests of several classes wait, each class gets work done in proportion to its `weight` (None:
    16 for high, 4 for normal, 1 for low). At most `max_queued` of its requests wait (None: as many as
    `max_queued_requests`).

    Raises:
        ConfigError: with all faults, one a line.
    """

    weight: float | None = None
    max_queued: int | None = None

    def __post_init__(self) -> None:
        faults = []
        weight, most = self.weight, self.max_queued
        if weight is not None and not _is_weight(weight):
            faults.append(f"weight must be a number above 0, at most {_MAX_WEIGHT:g}, got {weight!r}")
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            faults.append(f"max_queued must be an integer of at least 1, got {most!r}")
        if faults:
            raise ConfigError("\n".join(faults))


@dataclass(frozen=True, slots=True)
class Priorities:
    """One table for each class."""

    high: PriorityClass = PriorityClass()
    normal: PriorityClass = PriorityClass()
    low: PriorityClass = PriorityClass()

    def weight_of(self, priority: Priority) -> float:
        """That class's share, relative to the others'."""
        weight = self._of(priority).weight
        return _WEIGHTS[priority] if weight is None else weight

    def max_queued_of(self, priority: Priority, usual: int) -> int:
        """How many of that class may wait; `usual` where nothing is said."""
        return self._of(priority).max_queued or usual

    def _of(self, priority: Priority) -> PriorityClass:
        found: PriorityClass = getattr(self, priority.value)
        return found


assert [spec.name for spec in fields(Priorities)] == [priority.value for priority in Priority]

DEFAULT_PRIORITIES: Final = Priorities()


def _is_weight(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and 0 < value <= _MAX_WEIGHT  # type: ignore[operator,arg-type]
