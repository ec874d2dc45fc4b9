"""What a cluster costs when nobody asks: CPU of each idle process in percent of a core, and its memory
beside what it was given (weights plus KV budget).

    python -m benchmarks.footprint [--json] [--seconds 15]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

import psutil

from benchmarks.local_cluster import LocalService, running_cluster
from kvrelay.client import AsyncClient
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.embedded_model import ensure_smollm2

NUM_BLOCKS = 1024
BLOCK_TOKENS = 16


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def anonymous_bytes(pid: int) -> int:
    """Memory that belongs to the process alone: mapped libraries and files are not counted."""
    with open(f"/proc/{pid}/status") as status:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in status if line.startswith("Rss")}
    return (kib["RssAnon"] + kib["RssShmem"]) * 1024


async def use_once(address: str) -> None:
    """One answer, so that links are open and caches are filled, as in a cluster that has been used."""
    async with AsyncClient([address]) as client:
        await client.complete(list(range(100, 400)), sampling=SamplingParams(max_tokens=8, ignore_eos=True))


def measure(seconds: float) -> dict[str, dict[str, float]]:
    model = ensure_smollm2()
    with running_cluster(1, 1, ["--model", str(model), "--num-blocks", str(NUM_BLOCKS)]) as (
        address,
        services,
    ):
        asyncio.run(use_once(address))
        time.sleep(2.0)
        before = {service.pid: cpu_seconds(service.pid) for service in services}
        started = time.monotonic()
        time.sleep(seconds)
        elapsed = time.monotonic() - started
        return {
            service.role: _figures(service, (cpu_seconds(service.pid) - before[service.pid]) / elapsed)
            for service in services
        }


def _figures(service: LocalService, cpu_share: float) -> dict[str, float]:
    return {
        "idle_cpu_percent": 100 * cpu_share,
        "rss_mb": psutil.Process(service.pid).memory_info().rss / 1e6,
        "anonymous_mb": anonymous_bytes(service.pid) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=15.0)
    args = parser.parse_args()
    figures = measure(args.seconds)
    weights_mb = (ensure_smollm2() / "model.safetensors").stat().st_size / 1e6
    kv_mb = NUM_BLOCKS * BLOCK_TOKENS * 30 * 2 * 3 * 64 * 4 / 1e6
    if args.json:
        print(json.dumps({"processes": figures, "weights_mb": weights_mb, "kv_budget_mb": kv_mb}))
        return
    print(f"Idle cluster after one answer, over {args.seconds:.0f} s; a node was given")
    print(f"{weights_mb:.0f} MB of weights and {kv_mb:.0f} MB of KV")
    print(f"{'process':10}{'CPU, % of a core':>18}{'RSS MB':>10}{'of it anonymous':>18}")
    for role, row in figures.items():
        print(f"{role:10}{row['idle_cpu_percent']:>18.2f}{row['rss_mb']:>10.0f}{row['anonymous_mb']:>18.0f}")


if __name__ == "__main__":
    main()
