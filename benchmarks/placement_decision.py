"""What one placement decision of the policy `kvrelay` costs: 8,000 tokens, hashed, among 64 and 1,000 nodes.

    python -m benchmarks.placement_decision [--json]

Caches of eight nodes hold prefixes of it. Time of the policy with its index; *hashing* is the chain
of SHA-256 over the prompt's 500 blocks of 16 tokens, *decision* all else; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from random import Random

from benchmarks.router_core import describe
from kvrelay.core.ids import AttemptId, RequestId
from kvrelay.core.kv_events import KVChanges, KVEvent
from kvrelay.core.node_messages import KVReleased, PrefillFinished, Role
from kvrelay.router.cluster_state import ClusterState
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.placement import PlacementRequest
from kvrelay.router.prefix_aware import PrefixAware
from kvrelay.router.prefix_source import IndexedPrefixes

NUM_TOKENS, NUM_ROUNDS = 8000, 300


def measure(num_nodes: int) -> tuple[float, float]:
    """Median milliseconds of hashing and of the rest."""
    cluster = ClusterState(RouterCoreConfig(max_indexed_nodes=2 * num_nodes))
    policy = PrefixAware(IndexedPrefixes(cluster.block_index))
    nodes = [cluster.add_node(describe(f"{role}{n}", role), 0.0) for n in range(num_nodes) for role in Role]
    for node in nodes:
        policy.note_attached(node, 0.0)
        cluster.kv.apply(node.holdings, KVEvent(1, 0, KVChanges(cleared=True)), 0.0)
    holders = [node for node in nodes if node.description.role is Role.PREFILL][:64:8]
    rng, hashing_ms, rest_ms = Random(1), [], []
    for number in range(NUM_ROUNDS):
        tokens = tuple(rng.randrange(100_000) for _ in range(NUM_TOKENS))
        for node in holders:
            of_holder = PlacementRequest(RequestId("held"), "bench", tokens, 256)
            assert node.slot is not None
            cluster.block_index.store(node.slot, of_holder.block_keys(node)[: rng.randrange(1, 400)])
        request = PlacementRequest(RequestId(str(number)), "bench", tokens, 256)
        start_s = time.perf_counter()
        request.block_keys(nodes[0])
        hashed_s = time.perf_counter()
        decision = policy.choose(request, cluster, float(number), rng)
        assert decision is not None
        attempt = AttemptId(number + 1)
        policy.note_placed(attempt, request, decision, float(number))
        rest_ms.append((time.perf_counter() - hashed_s) * 1e3)
        hashing_ms.append((hashed_s - start_s) * 1e3)
        done = PrefillFinished(attempt, 0, 0.0, 0.2)
        policy.note_prefilled(cluster.nodes[decision.prefill_node], (done,), number + 0.2)
        policy.note_settled(decision.decode_node, KVReleased(attempt).attempt, number + 0.3)
    return statistics.median(hashing_ms), statistics.median(rest_ms)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    figures = {}
    for num_nodes in (64, 1000):
        hashing_ms, rest_ms = measure(num_nodes)
        figures[num_nodes] = {"hashing_ms": round(hashing_ms, 3), "decision_ms": round(rest_ms, 3)}
        if not options.json:
            print(f"{num_nodes:5} nodes: hashing {hashing_ms:.3f} ms, decision {rest_ms:.3f} ms")
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
