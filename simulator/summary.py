"""What a simulated run came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kvrelay.router.admission_queue import Refusal
from kvrelay.simulator.cost_model import CostModel
from kvrelay.simulator.gap_times import GapTimes
from kvrelay.simulator.measurements import Measurements
from kvrelay.simulator.scenario import Scenario
from kvrelay.simulator.simulation import Simulation
from kvrelay.simulator.trace import Trace


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds; None: nothing was measured."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """Rates are shares of prompt tokens: `hit_rate` was not computed (own caches and pulls), of which
    `pulled_rate` was pulled; `pooled_hit_rate` see `pooled_cache`. `goodput` is the share of all requests,
    refused ones included, that met all limits, `goodput_per_s` how many those were in each second in which
    requests came. `balance_max_over_mean` compares the busiest prefill node's work with the mean. Of those
    that were to be refused by their deadline, `trials` were served all the same, `trials_in_time` in time."""

    trace: str
    policy: str
    cost_model: str
    prefill_nodes: int
    decode_nodes: int
    cache_blocks: int
    block_tokens: int
    load: float
    seed: int
    requests: int
    refused: int
    unfinished: int
    duration_s: float
    ttft_s: Times
    itl_s: Times
    hit_rate: float
    pooled_hit_rate: float
    pulled_rate: float
    pulls: int
    prefill_utilisation: float
    balance_max_over_mean: float
    ttft_limit_s: float
    itl_limit_s: float
    total_limit_s: float
    refused_by_reason: dict[str, int]
    trials: int
    trials_in_time: int
    goodput: float
    goodput_per_s: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def summarise(
    trace: Trace, scenario: Scenario, costs: CostModel, done: Simulation, pooled_rate: float
) -> Summary:
    """The figures of a simulation that has run."""
    seen = done.seen
    served = np.array(seen.ttft_s)
    num_served = int((served >= 0).sum())
    busy_s = np.array([node.busy_s for node in done.prefill_nodes])
    duration_s = max(seen.end_s, 1e-9)
    tokens = max(1, seen.num_prompt_tokens)
    num_good = _num_good(seen, scenario)
    counts, by_reason = done.queue_counts, Counter[Refusal]()
    for (_, reason), number in counts.refused.items():
        by_reason[reason] += number
    arriving_s = max(float(trace.arrivals_s[-1]), 1e-9)
    return Summary(
        trace=trace.name,
        policy=scenario.policy,
        cost_model=costs.name,
        prefill_nodes=scenario.num_prefill_nodes,
        decode_nodes=scenario.num_decode_nodes,
        cache_blocks=scenario.cache_blocks,
        block_tokens=trace.block_tokens,
        load=scenario.load,
        seed=scenario.seed,
        requests=len(trace),
        refused=seen.num_refused,
        unfinished=len(trace) - num_served - seen.num_refused,
        duration_s=duration_s,
        ttft_s=_times(served[served >= 0]),
        itl_s=_gap_times(seen.gaps),
        hit_rate=seen.num_cached_tokens / tokens,
        pooled_hit_rate=pooled_rate,
        pulled_rate=seen.num_pulled_tokens / tokens,
        pulls=seen.num_pulls,
        prefill_utilisation=float(busy_s.mean()) / duration_s,
        balance_max_over_mean=float(busy_s.max() / busy_s.mean()) if busy_s.any() else 1.0,
        ttft_limit_s=scenario.ttft_limit_s,
        itl_limit_s=scenario.itl_limit_s,
        total_limit_s=scenario.total_limit_s,
        refused_by_reason={reason.value: number for reason, number in sorted(by_reason.items())},
        trials=counts.num_trials,
        trials_in_time=counts.num_trials_in_time,
        goodput=num_good / len(trace),
        goodput_per_s=num_good / arriving_s,
    )


def _num_good(seen: Measurements, scenario: Scenario) -> int:
    """A request without a second token has no gap that could be too long."""
    ttft_s, itl_s, total_s = np.array(seen.ttft_s), np.array(seen.itl_p99_s), np.array(seen.total_s)
    is_good = (ttft_s >= 0) & (ttft_s <= scenario.ttft_limit_s) & (itl_s <= scenario.itl_limit_s)
    is_good &= total_s <= scenario.total_limit_s
    return int(is_good.sum())


def _times(values: np.ndarray[Any, np.dtype[np.float64]]) -> Times:
    if not len(values):
        return Times(None, None, None, None)
    p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
    return Times(float(values.mean()), p50, p90, p99, float(values.max()))


def _gap_times(gaps: GapTimes) -> Times:
    return Times(gaps.mean_s, *(gaps.percentile_s(percent) for percent in (50, 90, 99)))
