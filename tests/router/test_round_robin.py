"""The policy `round-robin`: every node has its turn."""

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from kvrelay.core.ids import NodeId, RequestId
from kvrelay.router.cluster_state import ClusterState
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.placement import Decision, PlacementRequest
from kvrelay.router.round_robin import RoundRobin

RNG = Random(1)


@pytest.fixture
def cluster(say: Any) -> ClusterState:
    state = ClusterState(RouterCoreConfig())
    for node_id in ("p1", "p2", "p3", "d1", "d2"):
        state.add_node(say.describe_node(node_id), 0.0)
    return state


def place(policy: RoundRobin, cluster: ClusterState, avoided: frozenset[NodeId] = frozenset()) -> Decision:
    request = PlacementRequest(RequestId("r"), "m", (1, 2, 3), 4, avoided=avoided)
    decision = policy.choose(request, cluster, 0.0, RNG)
    assert decision is not None
    return decision


def test_each_role_takes_turns(cluster: ClusterState) -> None:
    policy = RoundRobin()
    pairs = [(d.prefill_node, d.decode_node) for d in (place(policy, cluster) for _ in range(6))]
    assert pairs == [("p1", "d1"), ("p2", "d2"), ("p3", "d1"), ("p1", "d2"), ("p2", "d1"), ("p3", "d2")]


def test_a_node_that_objects_or_failed_the_request_loses_its_turn(cluster: ClusterState) -> None:
    policy = RoundRobin()
    cluster.nodes[NodeId("p1")].is_draining = True
    decision = place(policy, cluster, frozenset({NodeId("p2")}))
    assert decision.prefill_node == "p3"
    shown = {candidate.node_id: candidate for candidate in decision.candidates}
    assert shown[NodeId("p1")].objection == "it drains"
    assert len(shown) == 5


def test_only_equal_fingerprints_are_paired(cluster: ClusterState, say: Any) -> None:
    other = say.describe_node("p0")
    cluster.add_node(replace(other, fingerprint=replace(other.fingerprint, dtype="bfloat16")), 0.0)
    policy = RoundRobin()
    assert NodeId("p0") not in [place(policy, cluster).prefill_node for _ in range(8)]


def test_nothing_is_placed_where_nobody_has_room(cluster: ClusterState) -> None:
    for node_id in ("d1", "d2"):
        cluster.nodes[NodeId(node_id)].record_refusal(0.0)
    request = PlacementRequest(RequestId("r"), "m", (1, 2, 3), 4)
    assert RoundRobin().choose(request, cluster, 0.0, RNG) is None
