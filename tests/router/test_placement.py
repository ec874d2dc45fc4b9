"""Least-loaded placement: who is chosen, and what the decision shows."""

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from kvrelay.core.ids import NodeId, RequestId
from kvrelay.core.node_messages import Role
from kvrelay.router.cluster_state import ClusterState, NodeState
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.least_loaded import LeastLoaded
from kvrelay.router.placement import Decision, PlacementRequest

REQUEST = PlacementRequest(RequestId("r"), "m", (1, 2, 3), num_growth_tokens=5)


class Scene:
    """A cluster without a router."""

    def __init__(self, say: Any) -> None:
        self.say = say
        self.cluster = ClusterState(RouterCoreConfig(max_prefill_tokens_per_node=100))

    def add(self, node_id: str, **changes: Any) -> NodeState:
        return self.cluster.add_node(self.say.describe_node(node_id, **changes), 0.0)

    def choose(self, request: PlacementRequest = REQUEST, seed: int = 0) -> Decision | None:
        return LeastLoaded().choose(request, self.cluster, 0.0, Random(seed))

    def pair(self, request: PlacementRequest = REQUEST) -> tuple[str, str] | None:
        decision = self.choose(request)
        return (decision.prefill_node, decision.decode_node) if decision else None


@pytest.fixture
def scene(say: Any) -> Scene:
    return Scene(say)


def test_the_prefill_node_with_fewest_outstanding_tokens_is_chosen(scene: Scene) -> None:
    for node_id, tokens in (("p1", 30), ("p2", 10), ("p3", 20)):
        scene.add(node_id).outstanding_prefill_tokens = tokens
    scene.add("d1")
    assert scene.pair() == ("p2", "d1")


def test_the_decode_node_with_most_head_room_is_chosen_by_share_not_by_count(scene: Scene) -> None:
    scene.add("p1")
    scene.add("d1", num_blocks=10).reserved_blocks = 5
    scene.add("d2", num_blocks=100).reserved_blocks = 20
    assert scene.pair() == ("p1", "d2")


def test_every_candidate_is_shown_with_its_terms_and_objections(scene: Scene) -> None:
    scene.add("p1").outstanding_prefill_tokens = 30
    scene.add("p2").is_draining = True
    scene.add("d1", num_blocks=10).reserved_blocks = 5
    scene.add("d2", num_blocks=10).reserved_blocks = 9
    decision = scene.choose()
    assert decision is not None
    shown = {candidate.node_id: candidate for candidate in decision.candidates}
    assert set(shown) == {"p1", "p2", "d1", "d2"}
    assert shown[NodeId("p1")].terms == (("outstanding_tokens", 30.0), ("new_tokens", 3.0))
    assert shown[NodeId("p1")].score == 33.0
    assert shown[NodeId("p2")].objection == "it drains"
    assert shown[NodeId("d1")].terms == (("reserved_share", 0.5), ("new_share", 0.2))
    assert shown[NodeId("d2")].objection == "2 blocks are needed, 1 of 10 are not set aside"


def test_only_equal_fingerprints_are_paired_even_if_others_are_idle(scene: Scene, say: Any) -> None:
    other = replace(say.describe_node("p1").fingerprint, dtype="bfloat16")
    scene.add("p1", fingerprint=other)
    scene.add("p2").outstanding_prefill_tokens = 50
    scene.add("d1")
    assert scene.pair() == ("p2", "d1")


def test_only_nodes_of_the_same_model_are_paired(scene: Scene) -> None:
    scene.add("p1", model="other")
    scene.add("d1")
    assert scene.pair() is None


@pytest.mark.parametrize("role", list(Role))
def test_without_a_free_node_of_a_role_there_is_no_pair(scene: Scene, role: Role) -> None:
    for node_id in ("p1", "d1"):
        node = scene.add(node_id)
        node.is_draining = node.description.role is role
    assert scene.pair() is None


def test_a_node_that_failed_the_request_is_avoided_while_another_exists(scene: Scene) -> None:
    scene.add("p1")
    scene.add("d1")
    busy = scene.add("d2")
    again = replace(REQUEST, avoided=frozenset({NodeId("d1")}))
    assert scene.pair(again) == ("p1", "d2")
    busy.reserved_blocks = busy.description.num_blocks
    assert scene.pair(again) is None
    busy.is_draining = True
    assert scene.pair(again) == ("p1", "d1")


def test_an_avoided_node_is_shown_as_such(scene: Scene) -> None:
    for node_id in ("p1", "d1", "d2"):
        scene.add(node_id)
    decision = scene.choose(replace(REQUEST, avoided=frozenset({NodeId("d1")})))
    assert decision is not None
    objections = {candidate.node_id: candidate.objection for candidate in decision.candidates}
    assert objections == {"p1": "", "d1": "it failed this request before", "d2": ""}


def test_ties_are_spread_by_the_given_randomness_and_repeat_with_it(scene: Scene) -> None:
    for node_id in ("p1", "d1", "d2", "d3"):
        scene.add(node_id)
    chosen, again = (
        [scene.choose(seed=seed).decode_node for seed in range(40)]  # type: ignore[union-attr]
        for _ in range(2)
    )
    assert set(chosen) == {"d1", "d2", "d3"}
    assert chosen == again


def test_a_sequence_that_a_node_cannot_hold_goes_to_one_that_can(scene: Scene) -> None:
    scene.add("p1")
    scene.add("d1", max_model_len=8)
    scene.add("d2").reserved_blocks = 20
    assert scene.pair(replace(REQUEST, token_ids=tuple(range(10)))) == ("p1", "d2")
