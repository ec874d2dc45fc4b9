"""A cluster of real processes under overload: how quickly it refuses, and what it still serves in time.

    python -m benchmarks.refusals [--json] [--seconds 10] [--ttft-limit-ms 500]

One prefill and one decode node with modelled engines; a prefill takes 50 ms, so 20 requests a second keep
it busy. Requests come at 0.8, 1 and 3 times that and say until when their first token counts. Goodput is how
many first tokens were in time, a second. Refusals are timed at the client, from its call to the error. Router
memory is its resident set after each load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Final

from benchmarks.local_cluster import running_cluster
from kvrelay.client import AsyncClient, ClientConfig
from kvrelay.core.errors import DeadlineExceeded, Overloaded
from kvrelay.core.sampling import SamplingParams

PREFILL_S: Final = 0.05
PROMPT_TOKENS: Final = 64
LOADS: Final = (0.8, 1.0, 3.0)
WARM_UP_S: Final = 3.0
AT_ONCE_S: Final = 0.05
NODE_ARGS: Final = (
    "--model=sim",
    f"--max-num-seqs={PROMPT_TOKENS}",
    f"--max-num-batched-tokens={PROMPT_TOKENS}",
    "--sim-prefill-base-s=0",
    f"--sim-prefill-token-s={PREFILL_S / PROMPT_TOKENS}",
    "--sim-prefill-token-context-s=0",
    "--sim-decode-base-s=0.002",
)


@dataclass(slots=True)
class Outcomes:
    """What became of the requests of one load. Seconds, at the client."""

    num_sent: int = 0
    ttft_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one load; None: nothing was refused."""

    load: float
    num_sent: int
    goodput_per_s: float
    num_refused: int
    refused_p50_ms: float | None
    refused_p99_ms: float | None
    refused_at_once: float | None
    """The share of refusals that took less than 50 ms."""
    router_rss_mb: float


async def _one(client: AsyncClient, number: int, ttft_limit_s: float, seen: Outcomes) -> None:
    begun_s = time.perf_counter()
    stream = client.generate(
        [1000 + number % 20_000] * PROMPT_TOKENS,
        sampling=SamplingParams(max_tokens=4, ignore_eos=True),
        ttft_timeout_s=ttft_limit_s,
        decode_text=False,
    )
    seen.num_sent += 1
    try:
        is_first = True
        async for _ in stream:
            if is_first:
                seen.ttft_s.append(time.perf_counter() - begun_s)
            is_first = False
    except (Overloaded, DeadlineExceeded):
        seen.refused_s.append(time.perf_counter() - begun_s)


async def _offer(client: AsyncClient, rate: float, seconds: float, ttft_limit_s: float) -> Outcomes:
    rng, seen, number = Random(1), Outcomes(), 0
    end_s = time.perf_counter() + seconds
    async with asyncio.TaskGroup() as tasks:
        while time.perf_counter() < end_s:
            number += 1
            tasks.create_task(_one(client, rng.randrange(10**9), ttft_limit_s, seen))
            await asyncio.sleep(rng.expovariate(rate))
    return seen


def _row(load: float, seconds: float, ttft_limit_s: float, seen: Outcomes, pid: int) -> Row:
    refused = sorted(seen.refused_s)

    def percentile_ms(share: float) -> float | None:
        return refused[min(len(refused) - 1, int(share * len(refused)))] * 1e3 if refused else None

    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Row(
        load=load,
        num_sent=seen.num_sent,
        goodput_per_s=sum(ttft_s <= ttft_limit_s for ttft_s in seen.ttft_s) / seconds,
        num_refused=len(refused),
        refused_p50_ms=percentile_ms(0.5),
        refused_p99_ms=percentile_ms(0.99),
        refused_at_once=sum(one < AT_ONCE_S for one in refused) / len(refused) if refused else None,
        router_rss_mb=pages * 4096 / 1e6,
    )


async def measure(seconds: float, ttft_limit_s: float) -> list[Row]:
    """One row for each load, on one cluster."""
    with running_cluster(1, 1, NODE_ARGS) as (address, services):
        config = ClientConfig(max_retries=0)
        async with AsyncClient([address], config=config) as client:
            await _offer(client, 1 / PREFILL_S, WARM_UP_S, ttft_limit_s)
            rows = []
            for load in LOADS:
                seen = await _offer(client, load / PREFILL_S, seconds, ttft_limit_s)
                rows.append(_row(load, seconds, ttft_limit_s, seen, services[0].pid))
            return rows


def report(rows: Sequence[Row]) -> list[str]:
    """For people."""
    lines = [
        "| load | sent | goodput/s | refused | refused after ms p50 / p99 | in under 50 ms | router MB |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        times = at_once = "-"
        if row.refused_at_once is not None:
            times = f"{row.refused_p50_ms:.1f} / {row.refused_p99_ms:.1f}"
            at_once = f"{row.refused_at_once:.0%}"
        lines.append(
            f"| {row.load} | {row.num_sent} | {row.goodput_per_s:.1f} | {row.num_refused} | {times}"
            f" | {at_once} | {row.router_rss_mb:.0f} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--ttft-limit-ms", type=float, default=500.0)
    options = parser.parse_args(arguments)
    rows = asyncio.run(measure(options.seconds, options.ttft_limit_ms / 1e3))
    print(json.dumps([asdict(row) for row in rows]) if options.json else "\n".join(report(rows)))


if __name__ == "__main__":
    main()
