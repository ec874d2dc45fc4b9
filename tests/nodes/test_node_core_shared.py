"""What both roles have in common: admission, leases over several routers, drain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvrelay.core.ids import AttemptId
from kvrelay.core.node_messages import AttemptRefused, DrainStarted, Role
from kvrelay.node.events import (
    CancelTransfer,
    CloseRouter,
    DrainRequested,
    NodeEffect,
    ReleaseSequence,
    RouterFrameReceived,
    RouterStreamLost,
    SequenceReleased,
    Ticked,
    TransferCancelled,
)

if TYPE_CHECKING:
    from tests.nodes.conftest import CoreUnderTest

OTHER_EPOCH = 8


def start(node: CoreUnderTest, attempt: int, epoch: int = 7) -> list[NodeEffect]:
    is_prefill = node.core.role is Role.PREFILL
    return node.prefill(attempt, epoch) if is_prefill else node.reserve(attempt, epoch)


def settle(node: CoreUnderTest, effects: list[NodeEffect]) -> None:
    """Answer every cancel and release until nothing more is asked."""
    while effects:
        effect = effects.pop(0)
        if isinstance(effect, CancelTransfer):
            effects += node.tell(TransferCancelled(effect.transfer_id))
        elif isinstance(effect, ReleaseSequence):
            effects += node.tell(SequenceReleased(effect.key))


def test_attempts_above_the_bound_are_refused_until_one_is_gone(node: CoreUnderTest) -> None:
    for attempt in (1, 2, 3, 4):
        assert start(node, attempt)
    assert start(node, 5) == []
    [report] = node.take_reports()
    assert isinstance(report, AttemptRefused)
    assert report.attempt == 5
    assert report.code == "OVERLOADED"
    settle(node, node.release(1))
    node.take_reports()
    assert start(node, 6)
    assert node.take_reports() == []


def test_a_draining_node_tells_all_routers_and_refuses_new_attempts(node: CoreUnderTest) -> None:
    node.connect(OTHER_EPOCH)
    node.tell(DrainRequested())
    node.tell(DrainRequested())
    assert node.reports == [(7, DrainStarted()), (OTHER_EPOCH, DrainStarted())]
    node.reports.clear()
    assert start(node, 1) == []
    [report] = node.take_reports()
    assert isinstance(report, AttemptRefused)
    assert report.code == "NODE_UNAVAILABLE"


def test_a_router_that_attaches_to_a_draining_node_hears_of_the_drain(node: CoreUnderTest) -> None:
    node.tell(DrainRequested())
    node.reports.clear()
    node.connect(OTHER_EPOCH)
    assert node.reports == [(OTHER_EPOCH, DrainStarted())]


def test_anything_heard_renews_the_lease(node: CoreUnderTest) -> None:
    start(node, 1)
    for _ in range(5):
        node.now_s += 2.9
        node.tell(RouterFrameReceived(7))
        assert node.tell(Ticked()) == []
    assert node.core.num_attempts == 1


def test_a_lost_router_costs_only_its_own_attempts(node: CoreUnderTest) -> None:
    start(node, 1)
    node.connect(OTHER_EPOCH)
    start(node, 1, OTHER_EPOCH)
    node.now_s += 2.0
    node.tell(RouterFrameReceived(OTHER_EPOCH))
    node.now_s += 2.0
    effects = node.tell(Ticked())
    assert CloseRouter(7, "nothing was heard from the router for longer than its lease") in effects
    assert not any(isinstance(effect, CloseRouter) and effect.router_epoch != 7 for effect in effects)
    settle(node, effects)
    assert [transfer_id.router_epoch for transfer_id in node.core.states()] == [OTHER_EPOCH]


def test_a_new_welcome_of_the_same_epoch_releases_what_the_old_stream_held(node: CoreUnderTest) -> None:
    start(node, 1)
    node.tell(RouterStreamLost(7))
    settle(node, node.connect())
    assert node.core.num_attempts == 0
    assert node.take_reports() == []
    assert start(node, 2)


def test_a_release_asked_for_on_the_new_stream_is_answered(node: CoreUnderTest) -> None:
    start(node, 1)
    node.tell(RouterStreamLost(7))
    effects = node.connect()
    node.release(1)
    settle(node, effects)
    assert [report.attempt for report in node.take_reports()] == [AttemptId(1)]  # type: ignore[union-attr]


def test_frames_of_a_router_whose_lease_has_run_out_are_ignored(node: CoreUnderTest) -> None:
    node.now_s += 10
    node.tell(Ticked())
    assert start(node, 1) == []
    assert node.core.num_attempts == 0
    assert node.take_reports() == []
