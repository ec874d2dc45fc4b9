"""A cluster of real processes under steady load while everything happens to it that can: from the
repository's root, ``python -m tests.soak.run --minutes 30``.

Every few minutes the mishaps end, then the load; then nobody may hold anything, and memory is measured.
Exit status 0: no wrong answer, no block leaked, no process grew.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random, SystemRandom
from typing import Final

import httpx
import psutil

from kvrelay.client import AsyncClient
from kvrelay.engine.embedded_model import ensure_smollm2
from tests.fault_matrix.breakable_cluster import BreakableCluster, NotSeen
from tests.fault_matrix.caller import UnbrokenRun
from tests.soak.mishaps import LONG_LIVED, Mishaps
from tests.soak.report import Checkpoint, Figures, growth_faults, markdown, print_checkpoint
from tests.soak.traffic import Traffic

NODE_ARGUMENTS: Final = (
    "--model=sim",
    "--engine.tokenizer=smollm2",
    "--num-blocks=1024",
    "--max-num-batched-tokens=256",
    "--slot-bytes=16384",
    "--max-buffered-kv-keys=8192",
    "--sim-prefill-base-s=0.02",
    "--sim-decode-base-s=0.02",
)
"""The KV feed's buffer of changes is small, so that it is full early and what grows after that is a leak."""
NUM_LIBRARY_CALLERS: Final = 8
NUM_PROXY_CALLERS: Final = 4
NUM_CHECKPOINTS: Final = 10


@dataclass(frozen=True, slots=True)
class Options:
    """Of the command line."""

    minutes: float
    seed: int
    out: Path | None


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="of load and mishaps; drawn unless given")
    parser.add_argument("--out", type=Path, default=None, help="write the figures there, as Markdown")
    given = parser.parse_args()
    seed = SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    return asyncio.run(_run(Options(given.minutes, seed, given.out)))


async def _run(options: Options) -> int:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(16))
    print(f"soak: seed {options.seed}, {options.minutes:g} minutes", flush=True)
    with tempfile.TemporaryDirectory(prefix="kvrelay-soak-") as folder:
        cluster = BreakableCluster(Path(folder), NODE_ARGUMENTS, ())
        try:
            await cluster.start()
            figures = await _soak(cluster, options)
        finally:
            await cluster.close()
    text = markdown(figures)
    print(text)
    if options.out is not None:
        options.out.write_text(text)
    for fault in figures.faults:
        print(f"FAULT: {fault}")
    return 1 if figures.faults else 0


async def _soak(cluster: BreakableCluster, options: Options) -> Figures:
    unbroken = UnbrokenRun(str(ensure_smollm2()))
    limits = httpx.Limits(max_connections=None)
    async with (
        cluster.client() as client,
        httpx.AsyncClient(base_url=cluster.base_url, timeout=300, limits=limits) as http,
    ):
        traffic = Traffic(client, http, unbroken, Random(f"load {options.seed}"))
        await traffic.learn()
        mishaps = Mishaps(cluster, Random(f"mishaps {options.seed}"))
        return await _play(cluster, client, traffic, mishaps, options)


async def _play(
    cluster: BreakableCluster, client: AsyncClient, traffic: Traffic, mishaps: Mishaps, options: Options
) -> Figures:
    started_s = time.monotonic()
    figures = Figures(options.seed, 0.0, [], [])
    for number in range(1, NUM_CHECKPOINTS + 1):
        until_s = started_s + number * options.minutes * 60.0 / NUM_CHECKPOINTS
        traffic.begin(NUM_LIBRARY_CALLERS, NUM_PROXY_CALLERS)
        mishaps.begin()
        await asyncio.sleep(max(0.0, until_s - time.monotonic()))
        await mishaps.end()
        await traffic.end()
        ended_s = time.monotonic()
        figures.faults.extend(await _leaks(cluster))
        checkpoint = _checkpoint(cluster, traffic, mishaps, ended_s - started_s, time.monotonic() - ended_s)
        figures.checkpoints.append(checkpoint)
        print_checkpoint(checkpoint)
    figures.minutes = (time.monotonic() - started_s) / 60.0
    figures.faults.extend([*traffic.counts.faults, *mishaps.faults, *growth_faults(figures.checkpoints)])
    return figures


async def _leaks(cluster: BreakableCluster) -> list[str]:
    try:
        await cluster.until_whole()
    except NotSeen as error:
        return [f"not free after load and mishaps: {error}"]
    return []


def _checkpoint(
    cluster: BreakableCluster, traffic: Traffic, mishaps: Mishaps, at_s: float, free_s: float
) -> Checkpoint:
    counts = traffic.counts
    pids = {name: int(cluster.replicas[name].ready["pid"]) for name in LONG_LIVED}
    pids["client"] = os.getpid()
    return Checkpoint(
        at_s=at_s,
        num_answers=counts.num_answers,
        num_tokens=counts.num_tokens,
        num_taken_up_by_client=counts.num_taken_up_by_client,
        num_taken_up_by_router=counts.num_taken_up_by_router,
        num_wrong=len(counts.faults),
        errors=dict(counts.errors),
        mishaps=dict(mishaps.num),
        free_s=free_s,
        rss_mib={name: psutil.Process(pid).memory_info().rss / (1 << 20) for name, pid in pids.items()},
    )


if __name__ == "__main__":
    sys.exit(main())
