"""What one placement decision of the policy `kvrelay` costs: 8,000 tokens, hashed, among 64 and 1,000 nodes.

    python -m benchmarks.placement_decision [--json]

Caches hold prefixes of it on every eighth node. CPU time of the policy with its index; *hashing* is the chain
of SHA-256 over the prompt's 500 blocks of 16 tokens, *decision* all else; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from benchmarks.router_core import describe
from kvrelay.core.block_hash import chain_hashes, root_hash
from kvrelay.core.ids import AttemptId, NodeId, RequestId
from kvrelay.core.node_messages import KVReleased, PrefillFinished, Role
from kvrelay.router.block_index import BlockIndex, BlockKeys, PrefixMatch
from kvrelay.router.cluster_state import ClusterState
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.placement import NodeView, PlacementRequest
from kvrelay.router.prefix_aware import PrefixAware

NUM_TOKENS, BLOCK_SIZE, NUM_ROUNDS = 8000, 16, 300


@dataclass
class Prefixes:
    """Hashes tokens as nodes do, at every look."""

    index: BlockIndex
    slots: dict[NodeId, int]
    hashing_s: float = 0.0

    def keys(self, request: PlacementRequest, node: NodeView) -> BlockKeys:
        start_s = time.process_time()
        keys = keys_of(request.token_ids)
        self.hashing_s += time.process_time() - start_s
        return keys

    def match_prefix(self, keys: BlockKeys) -> PrefixMatch:
        return self.index.match_prefix(keys)

    def index_slot(self, node: NodeView) -> int:
        return self.slots[node.description.node_id]


def keys_of(token_ids: Sequence[int]) -> list[int]:
    return [int.from_bytes(name[:8], "little") for name in chain_hashes(token_ids, BLOCK_SIZE, root_hash())]


def measure(num_nodes: int) -> tuple[float, float]:
    """Median milliseconds of hashing and of the rest."""
    prefixes = Prefixes(BlockIndex(2_000_000, 2 * num_nodes), {})
    policy, cluster = PrefixAware(prefixes), ClusterState(RouterCoreConfig())
    for number in range(num_nodes):
        for role in Role:
            node_id = NodeId(f"{role}{number}")
            prefixes.slots[node_id] = len(prefixes.slots)
            policy.note_attached(cluster.add_node(describe(node_id, role), 0.0), 0.0)
    rng, hashing_ms, rest_ms = Random(1), [], []
    for number in range(NUM_ROUNDS):
        tokens = tuple(rng.randrange(100_000) for _ in range(NUM_TOKENS))
        for slot in range(0, num_nodes, 8):
            prefixes.index.store(2 * slot, keys_of(tokens)[: rng.randrange(1, 400)] if slot < 64 else [])
        request = PlacementRequest(RequestId(str(number)), "bench", tokens, 256)
        prefixes.hashing_s, start_s = 0.0, time.process_time()
        decision = policy.choose(request, cluster, float(number), rng)
        assert decision is not None
        attempt = AttemptId(number + 1)
        policy.note_placed(attempt, request, decision, float(number))
        rest_ms.append((time.process_time() - start_s - prefixes.hashing_s) * 1e3)
        hashing_ms.append(prefixes.hashing_s * 1e3)
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
