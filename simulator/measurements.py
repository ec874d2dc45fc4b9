"""What is seen of a simulated run."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from kvrelay.simulator.gap_times import GapTimes


@dataclass(slots=True, eq=False)
class Measurements:
    """What was seen. Columns by request; -1: it was refused, or had no gaps."""

    ttft_s: array[float]
    itl_p99_s: array[float]
    total_s: array[float]
    gaps: GapTimes = field(default_factory=GapTimes)
    num_refused: int = 0
    num_placed: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_pulled_tokens: int = 0
    num_pulls: int = 0
    end_s: float = 0.0

    @classmethod
    def of(cls, num_requests: int) -> Measurements:
        """Of a run over so many requests, before it."""
        first, second, third = (array("d", [-1.0]) * num_requests for _ in range(3))
        return cls(first, second, third)
