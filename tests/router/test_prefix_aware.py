"""The policy `kvrelay`: who gets which prompt, and who waits."""

from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay.core.ids import AttemptId, NodeId, RequestId
from kvrelay.core.node_messages import NodeLoad, PrefillFinished
from kvrelay.router.block_index import BlockIndex, BlockKeys, PrefixMatch
from kvrelay.router.cluster_state import ClusterState, NodeState
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.placement import Decision, NodeView, Pick, PlacementRequest
from kvrelay.router.prefix_aware import PrefixAware

BLOCK = 100
SLOTS = ("p1", "p2", "p3", "d1", "d2")


class Prefixes:
    """Each token id is the key of a block of its own."""

    def __init__(self) -> None:
        self.index = BlockIndex(10_000, len(SLOTS))

    def keys(self, request: PlacementRequest, node: NodeView) -> BlockKeys:
        return list(request.token_ids[::BLOCK])

    def match_prefix(self, keys: BlockKeys) -> PrefixMatch:
        return self.index.match_prefix(keys)

    def pullable(self, match: PrefixMatch) -> NDArray[np.int64]:
        return match.device * self.index.is_current

    def index_slot(self, node: NodeView) -> int:
        return SLOTS.index(node.description.node_id)


class Scene:
    """A policy and a cluster; time stands still."""

    def __init__(self, say: Any) -> None:
        self.prefixes = Prefixes()
        self.policy = PrefixAware(self.prefixes)
        self.cluster = ClusterState(RouterCoreConfig())
        self.rng = Random(1)
        self.num_attempts = 0
        for node_id in SLOTS:
            changes = {"num_blocks": 1000, "block_size": BLOCK, "max_model_len": 100_000}
            changes |= {"transfer_address": f"{node_id}:1"}
            node = self.cluster.add_node(say.describe_node(node_id, **changes), 0.0)
            self.policy.note_attached(node, 0.0)

    def node(self, node_id: str) -> NodeState:
        return self.cluster.nodes[NodeId(node_id)]

    def hold(self, node_id: str, *keys: int) -> None:
        self.prefixes.index.store(SLOTS.index(node_id), keys)

    def pick(self, *waiting: PlacementRequest, now_s: float = 1.0) -> Pick | None:
        return self.policy.pick(waiting, self.cluster, now_s, self.rng)

    def place(self, request: PlacementRequest, now_s: float = 1.0) -> Decision:
        picked = self.pick(request, now_s=now_s)
        assert picked is not None
        self.num_attempts += 1
        self.policy.note_placed(AttemptId(self.num_attempts), request, picked.decision, now_s)
        return picked.decision

    def finish(self, node_id: str, attempt: int, compute_s: float, now_s: float) -> None:
        """The node's prefill of that attempt is computed."""
        report = PrefillFinished(AttemptId(attempt), 0, 0.0, compute_s)
        self.policy.note_prefilled(self.node(node_id), (report,), now_s)

    def keep_busy(self, *node_ids: str) -> None:
        """By a prompt that only they hold."""
        for node_id in node_ids:
            key = 900 + SLOTS.index(node_id)
            self.hold(node_id, *([key] * 1))
            assert self.place(prompt(f"busy {node_id}", *([key] + [800] * 30))).prefill_node == node_id


def prompt(name: str, *blocks: int, submitted_s: float = 0.0) -> PlacementRequest:
    """Of one block for each number."""
    tokens = tuple(block for block in blocks for _ in range(BLOCK))
    return PlacementRequest(RequestId(name), "m", tokens, num_growth_tokens=8, submitted_s=submitted_s)


@pytest.fixture
def scene(say: Any) -> Scene:
    return Scene(say)


def test_an_idle_holder_gets_the_prompt(scene: Scene) -> None:
    scene.hold("p2", 1, 2, 3)
    decision = scene.place(prompt("r", 1, 2, 3, 4))
    assert (decision.prefill_node, decision.pull_from) == ("p2", None)
    assert decision.predicted_ttft_s is not None


def test_a_busy_holder_is_pulled_from_where_that_is_quicker_than_computing(scene: Scene) -> None:
    blocks = range(1, 100)
    scene.hold("p2", *blocks)
    scene.place(prompt("first", *blocks, *range(200, 300)))
    decision = scene.place(prompt("second", *blocks, 500))
    assert decision.prefill_node != "p2"
    assert (decision.pull_from, decision.num_pull_tokens) == ("p2", 99 * BLOCK)


def test_generated_blocks_are_pulled_back_from_the_decode_node_that_has_them(scene: Scene) -> None:
    blocks = range(1, 100)
    scene.hold("p2", *blocks[:50])
    scene.hold("d1", *blocks)
    decision = scene.place(prompt("second turn", *blocks, 500))
    assert decision.prefill_node == "p2", "which has the first half itself"
    assert (decision.pull_from, decision.num_pull_tokens) == ("d1", 99 * BLOCK)


def test_of_a_prefill_and_a_decode_node_that_hold_the_same_the_prefill_node_is_pulled_from(
    scene: Scene,
) -> None:
    blocks = range(1, 100)
    scene.hold("p2", *blocks)
    scene.hold("d1", *blocks)
    scene.place(prompt("first", *blocks, *range(200, 300)))
    assert scene.place(prompt("second", *blocks, 500)).pull_from == "p2"


def test_a_decode_node_that_drains_is_not_pulled_from(scene: Scene) -> None:
    scene.hold("d1", *range(1, 100))
    scene.policy.note_draining(scene.node("d1"))
    assert scene.place(prompt("r", *range(1, 101))).pull_from is None


def test_a_pair_that_failed_to_pull_is_left_alone_for_a_while(scene: Scene) -> None:
    blocks = range(1, 100)
    scene.hold("d1", *blocks)
    first = scene.place(prompt("first", *blocks, 500))
    assert first.pull_from == "d1"
    failed = PrefillFinished(AttemptId(1), 0, 0.0, 0.1, pull_error="TRANSFER_FAILED")
    scene.policy.note_prefilled(scene.node(first.prefill_node), (failed,), 1.1)
    second = scene.place(prompt("second", *blocks, 501), now_s=1.2)
    assert second.prefill_node != first.prefill_node, "others may still pull"
    assert second.pull_from == "d1"
    for node_id in {"p1", "p2", "p3"} - {first.prefill_node}:
        scene.policy.note_lost(scene.node(node_id))
    assert scene.place(prompt("third", *blocks, 502), now_s=1.3).pull_from is None
    scene.policy.note_settled(NodeId(first.prefill_node), AttemptId(3), 1.4)
    assert scene.place(prompt("fourth", *blocks, 503), now_s=60.0).pull_from == "d1"


def test_a_prompt_waits_while_every_node_is_busy_and_goes_to_the_first_that_is_free(scene: Scene) -> None:
    scene.keep_busy("p1", "p2", "p3")
    assert scene.pick(prompt("r", 1, 2)) is None
    scene.finish("p3", 3, 0.1, now_s=1.1)
    assert scene.place(prompt("r", 1, 2), 1.1).prefill_node == "p3"


def test_short_work_passes_long_work_but_not_for_ever(scene: Scene) -> None:
    long, short = prompt("long", *range(1, 200)), prompt("short", 300, submitted_s=0.5)
    picked = scene.pick(long, short)
    assert picked is not None
    assert picked.request is short
    late_short = prompt("short", 300, submitted_s=99.999)
    picked = scene.pick(long, late_short, now_s=100.0)
    assert picked is not None
    assert picked.request is long


def test_what_is_on_its_way_to_a_node_counts_as_cached_there(scene: Scene) -> None:
    blocks = list(range(1, 200))
    first = scene.place(prompt("first", *blocks))
    predicted_s = first.predicted_ttft_s
    assert predicted_s is not None
    later_s = 1.0 + 0.8 * predicted_s
    assert scene.pick(prompt("other", *range(500, 699)), now_s=later_s) is not None
    assert scene.pick(prompt("again", *blocks), now_s=later_s) is None, "what is left there is less than all"


def test_equals_share_what_is_new(scene: Scene) -> None:
    chosen = []
    for number in range(6):
        decision = scene.place(prompt(f"r{number}", 1000 + number), 1.0 + number)
        chosen.append(decision.prefill_node)
        scene.finish(decision.prefill_node, scene.num_attempts, 0.01, now_s=1.5 + number)
    assert {chosen.count(NodeId(name)) for name in ("p1", "p2", "p3")} == {2}


def test_a_node_that_objects_or_failed_the_request_is_left_out(scene: Scene) -> None:
    scene.hold("p2", 1, 2, 3)
    scene.node("p2").is_draining = True
    assert scene.place(prompt("r", 1, 2, 3, 4)).prefill_node != "p2"
    scene.node("p2").is_draining = False
    avoiding = PlacementRequest(
        RequestId("again"), "m", prompt("", 1, 2, 3, 4).token_ids, 8, avoided=frozenset({NodeId("p2")})
    )
    assert scene.place(avoiding).prefill_node != "p2"


def test_what_other_routers_sent_counts_as_backlog(scene: Scene) -> None:
    for node_id in ("p1", "p3"):
        scene.policy.note_load(scene.node(node_id), NodeLoad(num_waiting_tokens=50_000))
    assert scene.place(prompt("r", 1)).prefill_node == "p2"


def test_a_lost_node_is_forgotten_with_what_was_on_its_way_there(scene: Scene) -> None:
    scene.keep_busy("p1", "p2", "p3")
    scene.policy.note_lost(scene.node("p2"))
    assert scene.pick(prompt("r", 1)) is None
    scene.policy.note_attached(scene.node("p2"), 2.0)
    assert scene.place(prompt("r", 1)).prefill_node == "p2"


def test_a_sequence_goes_where_most_of_it_is_held_among_decode_nodes_as_full(scene: Scene) -> None:
    scene.hold("d2", 1, 2)
    assert scene.place(prompt("r", 1, 2, 3)).decode_node == "d2"


def test_without_room_to_decode_nothing_is_placed(scene: Scene) -> None:
    placed = 0
    while (picked := scene.pick(request := prompt(f"r{placed}", 5000 + placed))) is not None:
        scene.policy.note_placed(AttemptId(100 + placed), request, picked.decision, 1.0)
        scene.finish(picked.decision.prefill_node, 100 + placed, 0.01, now_s=1.0)
        placed += 1
    assert placed == 8, "two nodes of four places each"


def test_every_candidate_is_shown_with_terms_that_sum_to_its_score(scene: Scene) -> None:
    scene.hold("p2", 1, 2, 3)
    decision = scene.place(prompt("r", 1, 2, 3, 4))
    shown = {candidate.node_id: candidate for candidate in decision.candidates}
    assert set(shown) == set(SLOTS)
    terms = dict(shown[NodeId("p2")].terms)
    assert terms["cached_tokens"] == 300
    parts = sum(terms[name] for name in ("queue_s", "pull_s", "prefill_s", "others_s"))
    assert shown[NodeId("p2")].score == pytest.approx(parts)
    assert shown[NodeId("p2")].score == min(shown[NodeId(name)].score for name in ("p1", "p2", "p3"))
