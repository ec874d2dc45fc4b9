"""What simulating a large cluster takes: CPU time a request, at 1,000 prefill and 500 decode nodes.

    python -m benchmarks.simulator_speed [--json] [--requests 40000] [--prefill 1000] [--decode 500]
        [--policy kvrelay] [--cost-model h100] [--load 0.8]

The trace is made: sessions of several turns under shared system prompts, some of which are asked for far more
often than others. One core; reading a trace and the pooled cache's hit rate are not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from random import Random

import numpy as np

from kvrelay.simulator.cost_model import load_cost_model
from kvrelay.simulator.run import simulate
from kvrelay.simulator.scenario import Scenario
from kvrelay.simulator.trace import Trace

BLOCK_TOKENS = 512
NUM_TENANTS, SYSTEM_BLOCKS = 2000, 6


def make_trace(num_requests: int, seed: int = 0) -> Trace:
    """Poisson arrivals; each request opens a session or is the next turn of a recent one."""
    rng = Random(seed)
    next_id = NUM_TENANTS * SYSTEM_BLOCKS
    recent: list[list[int]] = []
    arrivals, starts, ids, prompts, outputs = [], [0], [], [], []
    now_s = 0.0
    for _ in range(num_requests):
        now_s += rng.expovariate(1.0)
        if recent and rng.random() < 0.6:
            session = recent[rng.randrange(len(recent))]
        else:
            tenant = int(NUM_TENANTS * rng.random() ** 3)
            session = [tenant * SYSTEM_BLOCKS + number for number in range(SYSTEM_BLOCKS)]
            recent.append(session)
            if len(recent) > 20_000:
                recent.pop(rng.randrange(len(recent)))
        new = rng.randrange(1, 8)
        session.extend(range(next_id, next_id + new))
        next_id += new
        if len(session) > 40:
            recent = [other for other in recent if other is not session]
        arrivals.append(now_s)
        ids.extend(session)
        starts.append(len(ids))
        prompts.append(len(session) * BLOCK_TOKENS - rng.randrange(BLOCK_TOKENS))
        outputs.append(rng.randrange(20, 400))
    return Trace(
        name="made",
        arrivals_s=np.array(arrivals) - arrivals[0],
        num_prompt_tokens=np.array(prompts, np.int64),
        num_output_tokens=np.array(outputs, np.int64),
        block_tokens=BLOCK_TOKENS,
        block_ids=np.array(ids, np.int64),
        block_starts=np.array(starts, np.int64),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--policy", default="kvrelay")
    parser.add_argument("--cost-model", default="h100")
    parser.add_argument("--load", type=float, default=0.8)
    for name, default in (("requests", 40_000), ("prefill", 1000), ("decode", 500), ("cache-blocks", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    trace, costs = make_trace(options.requests), load_cost_model(options.cost_model)
    scenario = Scenario(options.prefill, options.decode, options.cache_blocks, options.policy, options.load)
    start_s = time.process_time()
    summary, _ = simulate(trace, scenario, costs, pooled_rate=0.0)
    cpu_s = time.process_time() - start_s
    figures = {
        "requests": options.requests,
        "cpu_s": round(cpu_s, 1),
        "ms_per_request": round(1e3 * cpu_s / options.requests, 3),
        "hit_rate": round(summary.hit_rate, 4),
        "ttft_p90_s": summary.ttft_s.p90,
    }
    if options.json:
        print(json.dumps(figures))
        return
    print(f"{options.requests} requests, {options.prefill} + {options.decode} nodes, {options.policy}:")
    print(f"{cpu_s:.1f} s of CPU time, {figures['ms_per_request']} ms a request")
    print(f"hit rate {summary.hit_rate:.1%}, P90 TTFT {summary.ttft_s.p90:.3f} s")


if __name__ == "__main__":
    main()
