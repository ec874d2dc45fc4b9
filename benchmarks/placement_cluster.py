"""What placing by held prefixes does in a real cluster on this machine, beside policies that know no caches.

    python -m benchmarks.placement_cluster [--json] [--model sim] [--policies kvrelay,round-robin] ...

Router, prefill and decode nodes are processes of their own, started anew for each policy and asked the same
prompts, `--concurrency` at a time: of `--groups` shared prefixes each with suffixes of their own, in a random
order. A node's cache holds `--cached-groups` of the prefixes. *hit*: prompt tokens that prefill nodes had
cached, by their own reports; *index said*: the same as the router expected it when it placed. *TTFT error*:
median of the relative difference between predicted and measured, from the placement on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.local_cluster import running_cluster
from benchmarks.percentiles import percentile
from kvrelay.client import AsyncClient
from kvrelay.core.explanation import Explanation
from kvrelay.core.node_messages import Role
from kvrelay.core.sampling import SamplingParams

BLOCK_SIZE = 16
NUM_OUTPUT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as its client and its router saw it."""

    ttft_s: float
    explanation: Explanation

    @property
    def expected_cached_tokens(self) -> float | None:
        """None: the policy expects nothing."""
        decision = self.explanation.decision
        chosen = next(
            found
            for found in decision.candidates
            if found.role is Role.PREFILL and found.node_id == decision.prefill_node
        )
        return dict(chosen.terms).get("cached_tokens")

    @property
    def ttft_error(self) -> float | None:
        predicted_s = self.explanation.decision.predicted_ttft_s
        measured_s = self.explanation.measured.placed_ttft_s
        return None if predicted_s is None or not measured_s else abs(predicted_s / measured_s - 1.0)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one policy. Times in seconds, rates from 0 to 1; None: the policy predicts nothing."""

    policy: str
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    hit_rate: float
    expected_hit_rate: float | None
    ttft_error: float | None


def make_prompts(options: argparse.Namespace) -> list[tuple[int, ...]]:
    rng = random.Random(options.seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1000, 30_000) for _ in range(count))

    prefixes = [tokens(options.prefix_tokens) for _ in range(options.groups)]
    order = [number % options.groups for number in range(options.requests)]
    rng.shuffle(order)
    return [prefixes[group] + tokens(options.suffix_tokens) for group in order]


async def ask(client: AsyncClient, request_id: str, prompt: tuple[int, ...]) -> Asked:
    started = time.perf_counter()
    ttft_s = 0.0
    sampling = SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    async for _ in client.generate(prompt, sampling=sampling, request_id=request_id):
        ttft_s = ttft_s or time.perf_counter() - started
    return Asked(ttft_s, await client.explain(request_id))


async def ask_all(address: str, prompts: Sequence[tuple[int, ...]], concurrency: int) -> list[Asked]:
    waiting = iter(enumerate(prompts))
    done: list[Asked] = []

    async def keep_asking(client: AsyncClient) -> None:
        for number, prompt in waiting:
            done.append(await ask(client, f"r{number}", prompt))

    async with AsyncClient([address]) as client, asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(keep_asking(client))
    return done


def figures_of(policy: str, asked: Sequence[Asked]) -> Figures:
    num_tokens = sum(one.explanation.measured.num_prompt_tokens for one in asked)
    expected = [found for one in asked if (found := one.expected_cached_tokens) is not None]
    errors = [error for one in asked if (error := one.ttft_error) is not None]
    times_s = [one.ttft_s for one in asked]
    return Figures(
        policy=policy,
        ttft_mean_s=statistics.mean(times_s),
        ttft_p50_s=percentile(times_s, 50),
        ttft_p90_s=percentile(times_s, 90),
        hit_rate=sum(one.explanation.measured.num_cached_tokens or 0 for one in asked) / num_tokens,
        expected_hit_rate=sum(expected) / num_tokens if expected else None,
        ttft_error=statistics.median(errors) if errors else None,
    )


def measure(policy: str, options: argparse.Namespace) -> Figures:
    blocks = -(-(options.prefix_tokens + options.suffix_tokens) // BLOCK_SIZE) + 1
    num_blocks = options.cached_groups * blocks + options.concurrency * blocks
    router_args = ["--placement", policy, "--num-remembered-decisions", str(options.requests)]
    node_args = ["--model", options.model, "--block-size", str(BLOCK_SIZE), "--num-blocks", str(num_blocks)]
    if options.model == "sim":
        node_args += ["--sim-prefill-token-s", str(options.sim_prefill_token_s)]
    else:
        node_args += ["--threads", "1"]
    with running_cluster(options.prefill, options.decode, node_args, router_args) as (address, _):
        return figures_of(policy, asyncio.run(ask_all(address, make_prompts(options), options.concurrency)))


def row(figures: Figures, first: Figures) -> str:
    expected = "-" if figures.expected_hit_rate is None else f"{figures.expected_hit_rate:.1%}"
    error = "-" if figures.ttft_error is None else f"{figures.ttft_error:.0%}"
    times = (
        f"{figures.ttft_mean_s * 1e3:.0f} / {figures.ttft_p50_s * 1e3:.0f} / {figures.ttft_p90_s * 1e3:.0f}"
    )
    ratio = figures.ttft_mean_s / first.ttft_mean_s
    return f"{figures.policy:14}{times:>24}{ratio:>10.2f}{figures.hit_rate:>9.1%}{expected:>12}{error:>12}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", default="smollm2", help="a model's folder, smollm2 or sim")
    parser.add_argument("--sim-prefill-token-s", type=float, default=2e-4, help="of the model sim")
    parser.add_argument("--policies", default="kvrelay,least-loaded,round-robin")
    for name, default in (
        ("prefill", 2), ("decode", 2), ("requests", 72), ("concurrency", 3), ("groups", 12),
        ("cached-groups", 8), ("prefix-tokens", 512), ("suffix-tokens", 40), ("seed", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    if options.model == "smollm2":
        from kvrelay.engine.embedded_model import ensure_smollm2

        options.model = str(ensure_smollm2())
    done: list[Figures] = []
    if not options.json:
        names = ("TTFT ms mean/p50/p90", "mean, x", "hit", "index said", "TTFT error")
        print(" " * 14 + "{:>24}{:>10}{:>9}{:>12}{:>12}".format(*names))
    for policy in options.policies.split(","):
        done.append(measure(policy, options))
        if not options.json:
            print(row(done[-1], done[0]), flush=True)
    if options.json:
        print(json.dumps([asdict(figures) for figures in done]))


if __name__ == "__main__":
    main()
