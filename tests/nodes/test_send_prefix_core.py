"""A node of either role sends what its cache has of a prefix, and holds it no longer than that takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvrelay.core.block_hash import root_hash, sequence_digest
from kvrelay.core.errors import DuplicateRequest
from kvrelay.core.ids import AttemptId, BlockId, TransferId
from kvrelay.core.node_messages import AttemptFailed, AttemptRefused, KVReleased, Report
from kvrelay.core.request import Prefix
from kvrelay.kv_transfer.interface import PushSpec
from kvrelay.node.attempt import AttemptState, sequence_key
from kvrelay.node.events import (
    CancelTransfer,
    CloseRouter,
    DrainRequested,
    OpenPush,
    PinPrefix,
    PushPrefix,
    ReleaseSequence,
    SequenceRefused,
    SequenceReleased,
    Ticked,
    TransferCancelled,
)

if TYPE_CHECKING:
    from tests.nodes.conftest import CoreUnderTest

NINE = AttemptId(9)
ID = TransferId(7, NINE)
KEY = sequence_key(ID)


def opened(num_tokens: int) -> OpenPush:
    digest = sequence_digest(range(1, num_tokens + 1), root_hash(b"", b"fingerprint"))
    return OpenPush(PushSpec(ID, "p:1", num_tokens, digest))


def ended(node: CoreUnderTest) -> list[Report]:
    """The engine has freed what was pinned."""
    assert node.take_reports() == [], "nothing is reported while something is held"
    node.tell(SequenceReleased(KEY))
    assert node.core.num_attempts == node.core.num_open_transfers == 0
    return node.take_reports()


def test_what_is_held_is_pushed_and_let_go_of_when_it_has_arrived(node: CoreUnderTest) -> None:
    assert node.send_prefix() == [PinPrefix(KEY, Prefix((1, 2, 3, 4)))]
    assert node.state(9) is AttemptState.PINNING
    assert node.prefix_held(num_cached_tokens=4) == [opened(4), PushPrefix(ID, (BlockId(3),), 4)]
    assert node.state(9) is AttemptState.SENDING
    assert node.core.num_open_transfers == 1
    assert node.push_done(9) == [ReleaseSequence(KEY)]
    assert ended(node) == [KVReleased(NINE)]


def test_of_a_prefix_that_is_held_in_part_that_part_is_sent(node: CoreUnderTest) -> None:
    node.send_prefix()
    assert node.prefix_held(num_cached_tokens=2) == [opened(2), PushPrefix(ID, (BlockId(3),), 2)]


def test_a_node_that_has_nothing_lets_the_other_know_at_once(node: CoreUnderTest) -> None:
    node.send_prefix()
    assert node.prefix_held(num_cached_tokens=0) == [opened(4), CancelTransfer(ID)]
    assert node.tell(TransferCancelled(ID)) == [ReleaseSequence(KEY)]
    [report] = ended(node)
    assert isinstance(report, AttemptRefused)
    assert report.code == "NODE_UNAVAILABLE"


def test_what_the_engine_refuses_is_refused(node: CoreUnderTest) -> None:
    node.send_prefix()
    assert node.tell(SequenceRefused(KEY, DuplicateRequest("taken"))) == []
    assert node.take_reports() == [AttemptRefused(NINE, "DUPLICATE_REQUEST", "taken")]
    assert node.core.num_attempts == 0


def test_a_failed_push_frees_what_is_held(node: CoreUnderTest) -> None:
    node.send_prefix()
    node.prefix_held(num_cached_tokens=4)
    assert node.push_failed(9) == [ReleaseSequence(KEY)]
    assert ended(node) == [AttemptFailed(NINE, "TRANSFER_FAILED", "link lost")]


@pytest.mark.parametrize("is_pushed", [False, True], ids=["pinning", "sending"])
def test_a_release_frees_what_is_held(node: CoreUnderTest, is_pushed: bool) -> None:
    node.send_prefix()
    if is_pushed:
        node.prefix_held(num_cached_tokens=4)
        assert node.release(9) == [CancelTransfer(ID)]
        assert node.push_done(9) == []
        assert node.tell(TransferCancelled(ID)) == [ReleaseSequence(KEY)]
    else:
        assert node.release(9) == [ReleaseSequence(KEY)]
        assert node.prefix_held(num_cached_tokens=4) == []
    assert ended(node) == [KVReleased(NINE)]


def test_the_lease_of_a_lost_router_frees_what_is_held(node: CoreUnderTest) -> None:
    node.send_prefix()
    node.prefix_held(num_cached_tokens=4)
    node.now_s += 3.5
    effects = node.tell(Ticked())
    assert effects[0] == CancelTransfer(ID)
    assert isinstance(effects[1], CloseRouter)
    node.tell(TransferCancelled(ID))
    assert ended(node) == []


def test_a_draining_node_sends_nothing_new(node: CoreUnderTest) -> None:
    node.tell(DrainRequested())
    node.take_reports()
    assert node.send_prefix() == []
    [report] = node.take_reports()
    assert isinstance(report, AttemptRefused)


def test_sends_count_among_the_attempts_that_are_bounded(node: CoreUnderTest) -> None:
    for attempt in (1, 2, 3, 4):
        assert node.send_prefix(attempt)
    assert node.send_prefix(5) == []
    [report] = node.take_reports()
    assert isinstance(report, AttemptRefused)
    assert report.code == "OVERLOADED"


def test_a_send_that_is_started_twice_closes_the_stream(node: CoreUnderTest) -> None:
    node.send_prefix()
    assert node.send_prefix() == [CloseRouter(7, "attempt 9 was started twice")]
