"""What keeps a placement sound where nodes differ in what they can, and where several routers share them."""

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from kvrelay.core.ids import AttemptId, NodeId, RequestId
from kvrelay.core.kv_events import KVChanges, KVEvent
from kvrelay.core.node_messages import NodeLoad
from kvrelay.router.cluster_state import ClusterState
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.kv_routing import ask_again
from kvrelay.router.placement import Decision, PlacementRequest
from kvrelay.router.prefix_aware import PrefixAware
from kvrelay.router.prefix_source import IndexedPrefixes

BLOCK = 100
PREFILL = tuple(f"p{number}" for number in range(8))


class Router:
    """A policy with an index of its own over the same nodes."""

    def __init__(self, say: Any, seed: int, can_pull: Sequence[str] = PREFILL) -> None:
        self.cluster = ClusterState(RouterCoreConfig())
        self.policy = PrefixAware(IndexedPrefixes(self.cluster.block_index))
        self.rng = Random(seed)
        self.num_attempts = 0
        for node_id in (*PREFILL, "d0"):
            changes = {"num_blocks": 9000, "block_size": BLOCK, "max_model_len": 100_000, "max_num_seqs": 99}
            address = node_id if node_id in (*can_pull, "d0") else ""
            node = say.describe_node(node_id, transfer_address=address, **changes)
            self.policy.note_attached(self.cluster.add_node(node, 0.0), 0.0)
            self.hear(node_id, KVEvent(1, 0, KVChanges(cleared=True)), 0.0)

    def hear(self, node_id: str, event: KVEvent, now_s: float) -> None:
        """What the node says of its blocks."""
        self.cluster.kv.apply(self.cluster.nodes[NodeId(node_id)].holdings, event, now_s)

    def hold(self, node_id: str, request: PlacementRequest) -> None:
        node = self.cluster.nodes[NodeId(node_id)]
        assert node.slot is not None
        self.cluster.block_index.store(node.slot, request.block_keys(node))

    def place(self, request: PlacementRequest) -> Decision:
        picked = self.policy.pick((request,), self.cluster, 1.0, self.rng)
        assert picked is not None
        self.num_attempts += 1
        self.policy.note_placed(AttemptId(self.num_attempts), request, picked.decision, 1.0)
        return picked.decision

    def hear_load(self, node_id: str, num_waiting_tokens: int) -> None:
        load = NodeLoad(num_waiting_tokens=num_waiting_tokens)
        self.policy.note_load(self.cluster.nodes[NodeId(node_id)], load)


def prompt(number: int, num_blocks: int) -> PlacementRequest:
    tokens = tuple((number * 7919 + place) % 30_011 for place in range(num_blocks * BLOCK + 1))
    return PlacementRequest(RequestId(f"r{number}"), "m", tokens, 8)


@pytest.mark.parametrize(
    ("can_pull", "pulls"),
    [(PREFILL, True), (("p0",), False), (PREFILL[1:], False), ((), False)],
    ids=["all can", "only the holder can", "the holder can't", "nobody can"],
)
def test_a_pull_is_planned_only_between_nodes_that_can(
    say: Any, can_pull: tuple[str, ...], pulls: bool
) -> None:
    router, request = Router(say, 1, can_pull), prompt(1, 200)
    router.hold("p0", request)
    router.hear_load("p0", 60_000)
    decision = router.place(request)
    assert (decision.pull_from == "p0") == pulls
    assert pulls or decision.pull_from is None


def test_nothing_is_pulled_from_a_node_whose_events_are_missing(say: Any) -> None:
    router, request = Router(say, 1), prompt(1, 200)
    router.hold("p0", request)
    router.hear_load("p0", 60_000)
    router.hear("p0", KVEvent(5, 1, KVChanges(stored=(1,))), 0.5)  # the first four never came
    assert router.place(request).pull_from is None


def test_nothing_is_pulled_from_a_node_that_has_been_silent_about_its_blocks(say: Any) -> None:
    router, request = Router(say, 1), prompt(1, 200)
    router.hold("p0", request)
    router.hear_load("p0", 60_000)
    silence_s = router.cluster.config.node_silence_s
    list(ask_again(router.cluster, silence_s + 1.0))
    assert router.place(request).pull_from is None
    router.hear("p0", KVEvent(1, 0, KVChanges()), silence_s + 2.0)
    router.hear_load("p0", 120_000)
    assert router.place(request).pull_from == "p0", "it has spoken again, and nothing was missing"


def test_routers_that_see_the_same_do_not_all_take_the_same_node(say: Any) -> None:
    chosen = [Router(say, seed).place(prompt(1, 20)).prefill_node for seed in range(40)]
    assert max(map(chosen.count, chosen)) <= 12
    assert len(set(chosen)) >= 6


def test_one_routers_prompts_are_seen_by_another_through_the_nodes_load(say: Any) -> None:
    first, second = Router(say, 1), Router(say, 2)
    for number in range(4):
        busy = first.place(prompt(number, 50)).prefill_node
        second.hear_load(busy, 5000)
    taken = {second.place(prompt(100 + number, 50)).prefill_node for number in range(4)}
    assert taken.isdisjoint({sent for sent in PREFILL if _is_busy(first, sent)})
    assert len(taken) == 4


def _is_busy(router: Router, node_id: str) -> bool:
    fleet, _ = next(router.policy.fleets("m"))
    return bool(fleet.num_pending[fleet.slots.slot_of[NodeId(node_id)]])
