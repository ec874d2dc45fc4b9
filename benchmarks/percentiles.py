"""Percentiles of measured times."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import quantiles


def percentile(values: Sequence[float], percent: int) -> float:
    """The `percent`-th percentile, 1 <= percent <= 99, interpolated."""
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def summary_ms(values_s: Sequence[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds of times in seconds."""
    return {"p50": percentile(values_s, 50) * 1e3, "p99": percentile(values_s, 99) * 1e3}
