"""Times between tokens, counted in classes one per cent wide: percentiles of billions in little memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

_CLASS: Final = math.log(1.01)
_LEAST_S: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Segment:
    """So many gaps of the same length."""

    num_gaps: int
    gap_s: float


class GapTimes:
    """A histogram; what it answers is right to one per cent. The mean is exact."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._num = 0
        self._total_s = 0.0

    def add(self, gap_s: float, num_gaps: int) -> None:
        """Count so many gaps of this length."""
        if not num_gaps:
            return
        place = round(math.log(max(gap_s, _LEAST_S)) / _CLASS)
        self._counts[place] = self._counts.get(place, 0) + num_gaps
        self._num += num_gaps
        self._total_s += gap_s * num_gaps

    @property
    def mean_s(self) -> float | None:
        """None: there was no gap."""
        return self._total_s / self._num if self._num else None

    def percentile_s(self, percent: float) -> float | None:
        """The length that so many per cent of the gaps do not exceed; None: there was no gap."""
        if not self._num:
            return None
        left = self._num * percent / 100
        for place in sorted(self._counts):
            left -= self._counts[place]
            if left <= 0:
                return math.exp(place * _CLASS)
        return math.exp(max(self._counts) * _CLASS)


def own_percentile_s(segments: Sequence[Segment], percent: float) -> float:
    """The same of one sequence's gaps, exact; 0 if it has none."""
    if not segments:
        return 0.0
    gaps = np.array([segment.gap_s for segment in segments])
    counts = np.array([segment.num_gaps for segment in segments])
    order = gaps.argsort(kind="stable")
    place = int(np.searchsorted(counts[order].cumsum(), counts.sum() * percent / 100))
    return float(gaps[order][min(place, len(gaps) - 1)])
