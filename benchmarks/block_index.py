"""What the router's block index takes and how quick it is, when it is full, beside a dict of sets.

``python -m benchmarks.block_index [--json] [--entries 10000000]``

Blocks come in chains of 64; each chain goes to one node of 64, or to three of 1,000. `store_us` is per block
while the index fills, `full_store_us` once every block stored drops an older one, `longest_ms` the longest
batch of both. A match is of a chain of 500 blocks, each time of another one, so that most of it comes from
memory, or of one that was matched just before (`again`): every node of the cluster has a beginning of it, or
one node all of it (`one_holder`). The dict of sets gets a tenth of the entries. Each index has a process of
its own, so that the bytes are its alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import psutil
from numpy.typing import NDArray

from kvrelay.router.block_index import BlockIndex
from kvrelay.router.block_keys import PromptBlocks

CHAIN_BLOCKS = 64
MATCHED_BLOCKS = 500
NUM_MATCHES = 100
PROMPT_TOKENS, BLOCK_SIZE = 8000, 16
PLAIN_SHARE = 10
SHAPES = ((64, 1), (1000, 3))
"""Nodes, and copies of each chain."""


@dataclass(frozen=True, slots=True)
class Filled:
    """One index that has become full. Bytes are what the process grew by, and what the index estimates."""

    num_nodes: int
    num_copies: int
    num_entries: int
    bytes_per_entry: float
    estimated_bytes_per_entry: float
    megabytes: float
    store_us: float
    full_store_us: float
    longest_ms: float
    match_us_p50: float
    match_again_us_p50: float
    match_one_holder_us_p50: float


@dataclass(frozen=True, slots=True)
class FilledPlain:
    """The dict of sets."""

    num_nodes: int
    num_entries: int
    bytes_per_entry: float
    store_us: float
    match_us_p50: float
    match_again_us_p50: float


class PlainIndex:
    """What is compared with: each key's nodes in a set of their own, no bound."""

    def __init__(self) -> None:
        self._nodes: dict[int, set[int]] = {}

    def store(self, node: int, keys: NDArray[np.uint64]) -> None:
        for key in keys.tolist():
            self._nodes.setdefault(key, set()).add(node)

    def match_prefix(self, keys: NDArray[np.uint64]) -> dict[int, int]:
        """Leading blocks by node, of those that hold the first."""
        counts: dict[int, int] = {}
        holding: set[int] | None = None
        for depth, key in enumerate(keys.tolist()):
            nodes = self._nodes.get(key, set())
            still = set(nodes) if holding is None else holding & nodes
            counts.update(dict.fromkeys((holding or set()) - still, depth))
            holding = still
            if not still:
                break
        return counts | dict.fromkeys(holding or set(), len(keys))


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def fill(
    index: BlockIndex | PlainIndex,
    num_entries: int,
    num_nodes: int,
    num_copies: int,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Store so many entries; returns microseconds a block, and the longest batch in seconds."""
    spent_s = longest_s = 0.0
    num_stored = 0
    while num_stored < num_entries:
        keys = rng.integers(1, 2**64, CHAIN_BLOCKS, dtype=np.uint64)
        for node in rng.integers(0, num_nodes, num_copies).tolist():
            start_s = time.perf_counter()
            index.store(node, keys)
            batch_s = time.perf_counter() - start_s
            spent_s += batch_s
            longest_s = max(longest_s, batch_s)
            num_stored += CHAIN_BLOCKS
    return spent_s / num_stored * 1e6, longest_s


def match_us(
    index: BlockIndex | PlainIndex, holders: Sequence[int], num_entries: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Median microseconds to match a chain of which all `holders` have a beginning, and the last one all: for
    the first time in a while, and again. The chains take at most half of `num_entries`."""
    num_chains = max(1, min(NUM_MATCHES, num_entries // (2 * len(holders) * MATCHED_BLOCKS)))
    chains = rng.integers(1, 2**64, (num_chains, MATCHED_BLOCKS), dtype=np.uint64)
    for chain in chains:
        depths = rng.integers(1, MATCHED_BLOCKS, len(holders)).tolist()
        for node, depth in zip(holders, [*depths[:-1], MATCHED_BLOCKS], strict=True):
            index.store(node, chain[:depth])
    first_us, again_us = [], []
    for chain in chains:
        for times_us in (first_us, again_us):
            start_s = time.perf_counter()
            index.match_prefix(chain)
            times_us.append((time.perf_counter() - start_s) * 1e6)
    return round(statistics.median(first_us), 1), round(statistics.median(again_us), 1)


def measure(num_entries: int, num_nodes: int, num_copies: int) -> Filled:
    rng = np.random.default_rng(1)
    before = resident_bytes()
    index = BlockIndex(num_entries)
    store_us, longest_s = fill(index, num_entries, num_nodes, num_copies, rng)
    full_store_us, longest_full_s = fill(index, num_entries // 2, num_nodes, num_copies, rng)
    num_bytes = resident_bytes() - before
    estimated_bytes = index.num_bytes
    first_us, again_us = match_us(index, range(num_nodes), num_entries, rng)
    return Filled(
        num_nodes=num_nodes,
        num_copies=num_copies,
        num_entries=index.num_entries,
        bytes_per_entry=round(num_bytes / index.num_entries, 1),
        estimated_bytes_per_entry=round(estimated_bytes / index.num_entries, 1),
        megabytes=round(num_bytes / 1e6, 1),
        store_us=round(store_us, 3),
        full_store_us=round(full_store_us, 3),
        longest_ms=round(max(longest_s, longest_full_s) * 1e3, 2),
        match_us_p50=first_us,
        match_again_us_p50=again_us,
        match_one_holder_us_p50=match_us(index, [num_nodes // 2], num_entries, rng)[0],
    )


def measure_plain(num_entries: int, num_nodes: int, num_copies: int) -> FilledPlain:
    rng = np.random.default_rng(1)
    before = resident_bytes()
    plain = PlainIndex()
    store_us, _ = fill(plain, num_entries, num_nodes, num_copies, rng)
    num_bytes = resident_bytes() - before
    first_us, again_us = match_us(plain, range(num_nodes), num_entries * PLAIN_SHARE, rng)
    return FilledPlain(
        num_nodes=num_nodes,
        num_entries=num_entries,
        bytes_per_entry=round(num_bytes / num_entries, 1),
        store_us=round(store_us, 3),
        match_us_p50=first_us,
        match_again_us_p50=again_us,
    )


def hash_ms() -> float:
    """Median milliseconds to name the blocks of a prompt."""
    times_ms = []
    for number in range(NUM_MATCHES):
        token_ids = tuple(range(number, number + PROMPT_TOKENS))
        start_s = time.perf_counter()
        PromptBlocks(token_ids).keys(BLOCK_SIZE, b"fingerprint")
        times_ms.append((time.perf_counter() - start_s) * 1e3)
    return statistics.median(times_ms)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--entries", type=int, default=10_000_000)
    options = parser.parse_args(arguments)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        full = [pool.submit(measure, options.entries, *shape).result() for shape in SHAPES]
        fewer = options.entries // PLAIN_SHARE
        plain = [pool.submit(measure_plain, fewer, *shape).result() for shape in SHAPES]
    figures = {
        "hash_ms_of_8000_tokens": round(hash_ms(), 3),
        "index": [asdict(one) for one in full],
        "dict_of_sets": [asdict(one) for one in plain],
    }
    if options.json:
        print(json.dumps(figures))
        return
    print(f"{'hash_ms_of_8000_tokens':28} {figures['hash_ms_of_8000_tokens']}")
    for title, measured in (("index", full), ("dict of sets", plain)):
        for one in measured:
            print(f"\n{title}")
            for name, value in asdict(one).items():
                print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
