"""Which decode node a sequence goes to: room, pace, links, and what is there already."""

from random import Random
from typing import Any

import numpy as np
import pytest

from kvrelay.core.ids import AttemptId, NodeId, RequestId
from kvrelay.core.node_messages import NodeLoad
from kvrelay.router.cluster_state import ClusterState, NodeState
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.decode_fleet import DecodeChoice, DecodeFleet
from kvrelay.router.placement import PlacementRequest
from kvrelay.router.prefix_source import IndexedPrefixes

BLOCK = 16
P1 = NodeId("p1")


class Decoders:
    """A fleet of two decode nodes, d1 and d2, with an index."""

    def __init__(self, say: Any) -> None:
        self.cluster = ClusterState(RouterCoreConfig())
        self.index = self.cluster.block_index
        self.fleet = DecodeFleet(IndexedPrefixes(self.index))
        self.num_attempts = 0
        for node_id in ("d1", "d2"):
            changes = {"num_blocks": 2000, "block_size": BLOCK, "max_model_len": 20_000, "max_num_seqs": 64}
            self.fleet.add(self.cluster.add_node(say.describe_node(node_id, **changes), 0.0))

    def node(self, node_id: str) -> NodeState:
        return self.cluster.nodes[NodeId(node_id)]

    def hold(self, node_id: str, request: PlacementRequest, num_blocks: int) -> None:
        slot = self.node(node_id).slot
        assert slot is not None
        self.index.store(slot, request.block_keys(self.node(node_id))[:num_blocks])

    def choose(self, request: PlacementRequest, seed: int = 1) -> DecodeChoice | None:
        match = self.index.match_prefix(request.block_keys(self.node("d1")))
        return self.fleet.choose(request, P1, match, 1.0, Random(seed))

    def chosen(self, request: PlacementRequest, seed: int = 1) -> str:
        choice = self.choose(request, seed)
        assert choice is not None
        return choice.node.description.node_id

    def send(self, node_id: str, request: PlacementRequest, num_held: int = 0) -> AttemptId:
        self.num_attempts += 1
        attempt = AttemptId(self.num_attempts)
        self.fleet.note_sent(attempt, NodeId(node_id), request, P1, num_held)
        return attempt


def turn(number: int, num_tokens: int = 800, growth: int = 256) -> PlacementRequest:
    tokens = tuple((number * 1009 + position) % 997 for position in range(num_tokens))
    return PlacementRequest(RequestId(f"r{number}"), "m", tokens, growth)


@pytest.fixture
def decoders(say: Any) -> Decoders:
    return Decoders(say)


def test_a_later_turn_goes_back_to_the_node_that_has_its_prefix(decoders: Decoders) -> None:
    request = turn(1)
    decoders.hold("d2", request, 40)
    assert {decoders.chosen(request, seed) for seed in range(8)} == {"d2"}
    choice = decoders.choose(request)
    assert choice is not None
    shown = {found.node_id: dict(found.terms) for found in choice.candidates().candidates()}
    assert shown[NodeId("d2")]["held_tokens"] == 40 * BLOCK
    assert shown[NodeId("d2")]["handoff_s"] < shown[NodeId("d1")]["handoff_s"]


def test_it_does_not_go_back_to_a_node_that_is_much_busier(decoders: Decoders) -> None:
    request = turn(1)
    decoders.hold("d2", request, 40)
    for number in range(2, 14):
        decoders.send("d2", turn(number))
    assert decoders.chosen(request) == "d1"


def test_where_sending_is_slow_more_is_put_up_with_for_what_is_held(decoders: Decoders) -> None:
    request = turn(1)
    decoders.hold("d2", request, 40)
    for number in range(2, 14):
        decoders.send("d2", turn(number))
    for number in range(60):
        other = turn(100 + number, 200 + 10 * number)
        attempt = decoders.send("d1", other)
        decoders.fleet.note_prefilled(attempt, 1.0)
        decoders.fleet.note_handed_over(attempt, 1.0 + 0.01 * other.num_tokens)
        decoders.fleet.note_gone(attempt)
    assert decoders.chosen(request) == "d2"


def test_the_pair_with_the_quicker_link_is_preferred(decoders: Decoders) -> None:
    for number in range(100):
        for node_id, seconds in (("d1", 2.0), ("d2", 0.01)):
            attempt = decoders.send(node_id, turn(number))
            decoders.fleet.note_prefilled(attempt, 1.0)
            decoders.fleet.note_handed_over(attempt, 1.0 + seconds)
            decoders.fleet.note_gone(attempt)
    assert {decoders.chosen(turn(500), seed) for seed in range(8)} == {"d2"}


def test_the_node_with_the_quicker_steps_is_preferred(decoders: Decoders) -> None:
    for number in range(100):
        for node_id, step_s in (("d1", 0.03), ("d2", 0.01)):
            node = decoders.node(node_id)
            node.steps.reset()
            node.steps.note_other(0.0)
            node.steps.note_same(step_s)
            decoders.fleet.note_load(node, NodeLoad(num_running=1 + number % 8, num_held_blocks=50))
    assert {decoders.chosen(turn(500), seed) for seed in range(8)} == {"d2"}


def test_what_other_routers_have_on_a_node_counts(decoders: Decoders) -> None:
    decoders.fleet.note_load(decoders.node("d1"), NodeLoad(num_attempts=20, num_held_blocks=900))
    assert {decoders.chosen(turn(1), seed) for seed in range(8)} == {"d2"}
    decoders.fleet.note_load(decoders.node("d2"), NodeLoad(num_attempts=64))
    decoders.fleet.note_load(decoders.node("d1"), NodeLoad(num_attempts=64))
    assert decoders.choose(turn(1)) is None


def test_promised_growth_is_room_that_is_gone(decoders: Decoders) -> None:
    for number in range(10):
        for node_id in ("d1", "d2"):
            decoders.send(node_id, turn(number, num_tokens=1600, growth=1600))
    assert decoders.choose(turn(99)) is None, "ten sequences of 200 blocks fill 2,000"


def test_alike_nodes_are_drawn_so_that_routers_do_not_herd(decoders: Decoders) -> None:
    assert {decoders.chosen(turn(1), seed) for seed in range(20)} == {"d1", "d2"}


def test_a_handoff_that_is_verified_before_the_prefills_word_comes_counts_as_quick(
    decoders: Decoders,
) -> None:
    before_s = decoders.fleet.handoff_costs.seconds(P1, np.full(2, 800))
    for number in range(40):
        attempt = decoders.send("d1", turn(number))
        decoders.fleet.note_handed_over(attempt, 1.0)
        decoders.fleet.note_prefilled(attempt, 1.5)
        decoders.fleet.note_gone(attempt)
    after_s = decoders.fleet.handoff_costs.seconds(P1, np.full(2, 800))
    assert after_s[0] < before_s[0]
