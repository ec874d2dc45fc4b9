"""What the cluster adds to an idle engine: TTFT and ITL through client, router, prefill and decode node,
beside the same engine called directly, prompt by prompt in turns, same model, same threads.

    python -m benchmarks.cluster_overhead [--json] [--prompts 20] [--prompt-tokens 128] [--threads N]

Each engine has as many threads as `kvrelay up` gives it: its share of the cores. What the cluster adds is the
median of the differences between the two runs of one prompt, which a machine's change of pace leaves alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from itertools import pairwise
from pathlib import Path

from benchmarks.local_cluster import running_cluster
from benchmarks.percentiles import summary_ms
from kvrelay.client import AsyncClient
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.embedded_model import ensure_smollm2
from kvrelay.engine.factory import load_engine
from kvrelay.engine.interface import Engine, SequenceKey

TokenTimes = list[float]
"""Seconds from the request's start to each of its tokens."""


def time_engine(engine: Engine, prompt: tuple[int, ...], sampling: SamplingParams) -> TokenTimes:
    started = time.perf_counter()
    engine.submit(TokenRequest(prompt, len(prompt), sampling), SequenceKey("bench"))
    times: TokenTimes = []
    while engine.has_work():
        times.extend(time.perf_counter() - started for _ in engine.step().outputs)
    return times


async def time_cluster(client: AsyncClient, prompt: tuple[int, ...], sampling: SamplingParams) -> TokenTimes:
    started = time.perf_counter()
    times: TokenTimes = []
    async for chunk in client.generate(prompt, sampling=sampling):
        times.extend(time.perf_counter() - started for _ in chunk.token_ids)
    return times


def ttft_and_itl(runs: list[TokenTimes]) -> dict[str, dict[str, float]]:
    """The gap between first and second token holds the handoff and stands by itself."""
    later_gaps = [b - a for times in runs for a, b in pairwise(times[1:])]
    return {
        "ttft_ms": summary_ms([times[0] for times in runs]),
        "second_token_gap_ms": summary_ms([times[1] - times[0] for times in runs]),
        "itl_ms": summary_ms(later_gaps),
    }


def added_p50_ms(alone: list[TokenTimes], cluster: list[TokenTimes]) -> dict[str, float]:
    """Medians over prompts of what one prompt took more through the cluster."""

    def itl_s(times: TokenTimes) -> float:
        return statistics.median(b - a for a, b in pairwise(times[1:]))

    differences = {
        "ttft_ms": [through[0] - own[0] for own, through in zip(alone, cluster, strict=True)],
        "second_token_gap_ms": [
            (through[1] - through[0]) - (own[1] - own[0]) for own, through in zip(alone, cluster, strict=True)
        ],
        "itl_ms": [itl_s(through) - itl_s(own) for own, through in zip(alone, cluster, strict=True)],
    }
    return {name: 1e3 * statistics.median(values) for name, values in differences.items()}


async def measure(args: argparse.Namespace, model: Path) -> dict[str, object]:
    engine = load_engine(EngineConfig(model=str(model), num_blocks=1024, num_threads=args.threads))
    rng = random.Random(0)
    sampling = SamplingParams(max_tokens=args.tokens, ignore_eos=True)
    node_args = ["--model", str(model), "--num-blocks", "1024", "--transport", args.transport]
    node_args += ["--threads", str(args.threads)]
    alone: list[TokenTimes] = []
    cluster: list[TokenTimes] = []
    with running_cluster(1, 1, node_args) as (
        address,
        _,
    ):
        async with AsyncClient([address]) as client:
            for number in range(args.prompts + 2):
                prompt = tuple(rng.randrange(1000, 40000) for _ in range(args.prompt_tokens))
                engine_times = time_engine(engine, prompt, sampling)
                cluster_times = await time_cluster(client, prompt, sampling)
                if number >= 2:  # the first two warm both sides up
                    alone.append(engine_times)
                    cluster.append(cluster_times)
    figures = {"engine_alone": ttft_and_itl(alone), "cluster": ttft_and_itl(cluster)}
    return figures | {
        "added_p50_ms": added_p50_ms(alone, cluster),
        "prompts": args.prompts,
        "prompt_tokens": args.prompt_tokens,
        "transport": args.transport,
        "threads": args.threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--transport", default="auto")
    share = max(1, (os.cpu_count() or 1) // 2)
    parser.add_argument("--threads", type=int, default=share, help="of each engine; default: as `kvrelay up`")
    args = parser.parse_args()
    figures = asyncio.run(measure(args, ensure_smollm2()))
    if args.json:
        print(json.dumps(figures))
        return
    print(f"Cluster beside the engine alone: {args.prompts} prompts of {args.prompt_tokens} tokens, in turns")
    print(f"{'ms, p50 / p99':24}{'engine alone':>20}{'cluster':>20}{'added p50':>12}")
    for name in ("ttft_ms", "second_token_gap_ms", "itl_ms"):
        cells = [
            f"{figures[side][name]['p50']:.2f} / {figures[side][name]['p99']:.2f}"
            for side in ("engine_alone", "cluster")
        ]
        print(
            f"{name.removesuffix('_ms'):24}{cells[0]:>20}{cells[1]:>20}{figures['added_p50_ms'][name]:>12.2f}"
        )


if __name__ == "__main__":
    main()
