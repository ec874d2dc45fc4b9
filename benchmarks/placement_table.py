"""The policy `kvrelay` beside the baselines, by the simulator, as a Markdown table.

    python -m benchmarks.placement_table CONVERSATION SYNTHETIC [--json FILE] [--seed N] [--policies a,b]

CONVERSATION and SYNTHETIC are Mooncake's traces (of the first, the first 6,000 requests are used). Cells: hit
% / P90 TTFT s / mean TTFT s; no decode, cost model `independent`. Its last lines say in which cells `kvrelay`
is worse than the best baseline.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from kvrelay.simulator.cost_model import load_cost_model
from kvrelay.simulator.pooled_cache import pooled_hit_rate
from kvrelay.simulator.run import simulate
from kvrelay.simulator.scenario import Scenario
from kvrelay.simulator.summary import Summary
from kvrelay.simulator.trace_file import read_trace

POLICIES = (
    "kvrelay", "mooncake-pull", "mooncake", "dynamo", "sglang", "consistent-hash", "least-loaded", "random",
    "round-robin",
)  # fmt: skip
LOADS, NODES, CACHES = (0.8, 1.0, 1.2), (8, 32), (1000, 8000)
MAX_REQUESTS = 6000


def cells(path: Path, policies: Sequence[str], seed: int) -> list[list[Summary]]:
    """One row a setting, one summary a policy."""
    trace, costs = read_trace(path, 512, MAX_REQUESTS), load_cost_model("independent")
    rows = []
    pooled = {size: pooled_hit_rate(trace, size) for size in {n * c for n in NODES for c in CACHES}}
    for load in LOADS:
        for nodes in NODES:
            for cache in CACHES:
                scenarios = [Scenario(nodes, 0, cache, policy, load, seed) for policy in policies]
                done = [simulate(trace, s, costs, pooled_rate=pooled[nodes * cache])[0] for s in scenarios]
                rows.append(done)
                print(row_text(done), flush=True)
    return rows


def row_text(done: Sequence[Summary]) -> str:
    first = done[0]
    name = first.trace.removeprefix("mooncake_").split("_")[0]
    figures = [
        f"{summary.hit_rate * 100:.1f} / {summary.ttft_s.p90:.3f} / {summary.ttft_s.mean:.3f}"
        for summary in done
    ]
    setting = f"{name} | {first.load} | {first.prefill_nodes} | {first.cache_blocks:,}"
    return f"| {setting} | {first.pooled_hit_rate * 100:.1f} | " + " | ".join(figures) + " |"


def verdict(rows: Sequence[Sequence[Summary]]) -> list[str]:
    """In how many cells the first policy's P90 is better, equal and worse than the best other one's."""
    ratios = [
        (done[0].ttft_s.p90 or 0.0) / min(other.ttft_s.p90 or 0.0 for other in done[1:]) for done in rows
    ]
    better = sum(ratio < 0.995 for ratio in ratios)
    worse = [(ratio, done[0]) for ratio, done in zip(ratios, rows, strict=True) if ratio > 1.005]
    lines = [f"{better} cells better by 0.5 % or more, {len(rows) - better - len(worse)} within 0.5 %"]
    lines += [
        f"worse by {ratio - 1:.1%}: {one.trace} load {one.load} N {one.prefill_nodes} C {one.cache_blocks}"
        for ratio, one in worse
    ]
    gap = max(done[0].pooled_hit_rate - done[0].hit_rate for done in rows if done[0].cache_blocks == 8000)
    return [*lines, f"largest gap to the pooled hit rate at 8,000 blocks: {gap * 100:.2f} points"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    policies = options.policies.split(",")
    print("| trace | load | N | C | pooled hit % | " + " | ".join(policies) + " |")
    print("|---|--:|--:|--:|--:|" + "--:|" * len(policies))
    rows = [row for path in options.traces for row in cells(path, policies, options.seed)]
    print("\n" + "\n".join(verdict(rows)))
    if options.json is not None:
        options.json.write_text(json.dumps([[one.as_json() for one in row] for row in rows], indent=1))


if __name__ == "__main__":
    main()
