"""How long a node's decode steps take, by the times at which their tokens come."""

from __future__ import annotations


class StepTimer:
    """Gaps between steps of the same sequences; any other step only begins the next gap."""

    __slots__ = ("_last_s", "_num_gaps", "_total_s")

    def __init__(self) -> None:
        self._last_s = 0.0
        self._total_s = 0.0
        self._num_gaps = 0

    @property
    def mean_s(self) -> float | None:
        """Of the gaps since `reset`; None: there were none."""
        return self._total_s / self._num_gaps if self._num_gaps else None

    def note_same(self, now_s: float) -> None:
        """A step of the sequences that the step before was of."""
        self._total_s += now_s - self._last_s
        self._num_gaps += 1
        self._last_s = now_s

    def note_other(self, now_s: float) -> None:
        """A step of other sequences than the one before."""
        self._last_s = now_s

    def reset(self) -> None:
        """Forget the gaps so far."""
        self._total_s, self._num_gaps = 0.0, 0
