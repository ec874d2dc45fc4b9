"""A prefill node takes a prompt's prefix from another node; whatever becomes of that, it prefills."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from kvrelay.core.block_hash import DigestedTokens, root_hash, sequence_digest
from kvrelay.core.errors import Overloaded
from kvrelay.core.ids import AttemptId, BlockId, TransferId
from kvrelay.core.node_messages import AttemptFailed, KVReleased, PrefillFinished
from kvrelay.core.request import Prefix, TokenRequest
from kvrelay.engine.interface import SequenceKey
from kvrelay.kv_transfer.interface import ExpectedTransfer, PushSpec
from kvrelay.node.attempt import AttemptState, sequence_key
from kvrelay.node.events import (
    CancelTransfer,
    CloseRouter,
    DrainTimedOut,
    EngineDied,
    ExpectTransfer,
    KeepPrefix,
    NodeEffect,
    OpenPush,
    PrefillStarted,
    PrefixKept,
    RefuseTransfer,
    ReleaseSequence,
    ReservePrefix,
    SequenceRefused,
    SequenceReleased,
    SubmitPrefill,
    Ticked,
    TransferCancelled,
)

if TYPE_CHECKING:
    from tests.nodes.conftest import CoreUnderTest

ONE = AttemptId(1)
PULL = TransferId(7, AttemptId(9))
PULL_KEY = sequence_key(PULL)
ROOT = root_hash(b"", b"fingerprint")
ALL_FREED = [ReleaseSequence(PULL_KEY)]


@pytest.fixture
def prefill_begins(
    key: SequenceKey, transfer_id: TransferId, request_of: Callable[..., TokenRequest]
) -> list[NodeEffect]:
    """What follows when a pull is over."""
    request = request_of(5)
    spec = PushSpec(transfer_id, "d:1", 5, sequence_digest(request.token_ids, ROOT))
    return [OpenPush(spec), SubmitPrefill(key, request, transfer_id)]


def finish(p: CoreUnderTest, key: SequenceKey) -> PrefillFinished:
    """Compute the prompt, and take the report."""
    p.tell(PrefillStarted(key, p.now_s, 4))
    p.token()
    [report] = p.take_reports()
    assert isinstance(report, PrefillFinished)
    return report


def test_the_prompt_is_submitted_when_its_prefix_is_kept(
    p: CoreUnderTest, key: SequenceKey, prefill_begins: list[NodeEffect]
) -> None:
    assert p.prefill_with_pull() == [ReservePrefix(PULL_KEY, Prefix((1, 2, 3, 4)))]
    assert p.state() is AttemptState.PULLING
    tokens = DigestedTokens((1, 2, 3, 4), ROOT)
    expected = ExpectedTransfer(PULL, (BlockId(3),), 4, 1, tokens.digest(4), or_fewer=tokens)
    assert p.prefix_held(num_cached_tokens=1) == [ExpectTransfer(expected)]
    assert p.core.num_open_transfers == 1
    p.now_s += 0.5
    assert p.receive_done(9, num_tokens=3) == [KeepPrefix(PULL_KEY, 3), *prefill_begins]
    assert p.state() is AttemptState.PREFILLING
    p.tell(PrefixKept(PULL_KEY, 3))
    assert finish(p, key) == PrefillFinished(ONE, 4, 0.0, 0.0, num_pulled_tokens=2, pull_s=0.5)
    assert p.core.num_open_transfers == 1, "the push to the decode node"


def test_time_spent_pulling_is_not_time_spent_queueing(p: CoreUnderTest, key: SequenceKey) -> None:
    p.prefill_with_pull()
    p.prefix_held()
    p.now_s += 0.5
    p.receive_done(9)
    p.tell(PrefixKept(PULL_KEY, 4))
    p.now_s += 0.25
    p.tell(PrefillStarted(key, p.now_s, 4))
    p.now_s += 1.0
    p.token()
    [report] = p.take_reports()
    assert isinstance(report, PrefillFinished)
    assert (report.pull_s, report.queue_s, report.compute_s) == (0.5, 0.25, 1.0)


def test_a_prefix_that_is_here_already_is_not_pulled(
    p: CoreUnderTest, key: SequenceKey, prefill_begins: list[NodeEffect]
) -> None:
    p.prefill_with_pull()
    freed = [RefuseTransfer(PULL), *ALL_FREED]
    assert p.prefix_held(num_cached_tokens=4) == [*freed, *prefill_begins]
    assert finish(p, key) == PrefillFinished(ONE, 4, 0.0, 0.0)


def test_without_room_the_prompt_is_computed(
    p: CoreUnderTest, key: SequenceKey, prefill_begins: list[NodeEffect]
) -> None:
    p.prefill_with_pull()
    refused = p.tell(SequenceRefused(PULL_KEY, Overloaded("full")))
    assert refused == [RefuseTransfer(PULL), *ALL_FREED, *prefill_begins]
    assert finish(p, key).pull_error == "OVERLOADED"


def test_a_failed_transfer_is_computed_instead(
    p: CoreUnderTest, key: SequenceKey, prefill_begins: list[NodeEffect]
) -> None:
    p.prefill_with_pull()
    p.prefix_held()
    assert p.receive_failed(9) == [*ALL_FREED, *prefill_begins]
    assert p.receive_failed(9) == []
    p.tell(SequenceReleased(PULL_KEY))
    report = finish(p, key)
    assert (report.num_pulled_tokens, report.pull_error) == (0, "TRANSFER_FAILED")


def test_kv_that_turns_out_to_be_wrong_is_said_to_have_failed(p: CoreUnderTest, key: SequenceKey) -> None:
    p.prefill_with_pull()
    p.prefix_held(num_cached_tokens=1)
    p.receive_done(9)
    p.tell(PrefixKept(PULL_KEY, 0))
    report = finish(p, key)
    assert (report.num_pulled_tokens, report.pull_error) == (0, "TRANSFER_CORRUPT")


def pull_times_out(p: CoreUnderTest) -> list[NodeEffect]:
    p.now_s += 2.9  # the lease is 3 s, the pull's time 5 s
    p.command()
    p.now_s += 2.2
    p.command()
    return p.tell(Ticked())


def pull_is_stopped(p: CoreUnderTest) -> list[NodeEffect]:
    return p.stop_pull()


GIVE_UP = pytest.mark.parametrize(
    ("give_up", "code"), [(pull_times_out, "TRANSFER_TIMEOUT"), (pull_is_stopped, "TRANSFER_FAILED")]
)


@GIVE_UP
def test_a_pull_given_up_before_it_has_blocks_is_computed_at_once(
    p: CoreUnderTest,
    key: SequenceKey,
    prefill_begins: list[NodeEffect],
    give_up: Callable[[CoreUnderTest], list[NodeEffect]],
    code: str,
) -> None:
    p.prefill_with_pull()
    assert give_up(p) == [RefuseTransfer(PULL), *ALL_FREED, *prefill_begins]
    assert p.prefix_held() == [], "its release is behind it in the engine's queue"
    assert finish(p, key).pull_error == code


@GIVE_UP
def test_a_pull_given_up_while_it_arrives_is_computed_when_nothing_writes_its_blocks(
    p: CoreUnderTest,
    key: SequenceKey,
    prefill_begins: list[NodeEffect],
    give_up: Callable[[CoreUnderTest], list[NodeEffect]],
    code: str,
) -> None:
    p.prefill_with_pull()
    p.prefix_held()
    assert give_up(p) == [CancelTransfer(PULL)]
    assert p.receive_done(9) == [], "too late"
    assert pull_is_stopped(p) == []
    assert p.tell(TransferCancelled(PULL)) == [*ALL_FREED, *prefill_begins]
    assert finish(p, key).pull_error == code


def test_a_stop_that_comes_when_the_pull_is_over_changes_nothing(p: CoreUnderTest, key: SequenceKey) -> None:
    p.prefill_with_pull()
    p.prefix_held()
    p.receive_done(9)
    assert p.stop_pull() == []
    p.tell(PrefixKept(PULL_KEY, 4))
    assert p.stop_pull() == []
    assert p.stop_pull(77) == []
    assert finish(p, key).pull_error == ""


@pytest.mark.parametrize("how", ["released", "drained"])
def test_the_end_of_the_attempt_ends_its_pull_first(p: CoreUnderTest, key: SequenceKey, how: str) -> None:
    p.prefill_with_pull()
    p.prefix_held()
    ended = p.release() if how == "released" else p.tell(DrainTimedOut())
    assert ended == [CancelTransfer(PULL)]
    assert p.state() is AttemptState.CANCELLING
    assert p.tell(TransferCancelled(PULL)) == [*ALL_FREED, ReleaseSequence(key)]
    assert p.tell(SequenceReleased(PULL_KEY)) == []
    assert p.take_reports() == []
    p.tell(SequenceReleased(key))
    [report] = p.take_reports()
    assert isinstance(report, KVReleased if how == "released" else AttemptFailed)
    assert p.core.num_attempts == p.core.num_open_transfers == 0


def test_an_attempt_released_before_its_pull_has_blocks_frees_those_too(
    p: CoreUnderTest, key: SequenceKey
) -> None:
    p.prefill_with_pull()
    assert p.release() == [RefuseTransfer(PULL), *ALL_FREED, ReleaseSequence(key)]
    assert p.prefix_held() == []
    p.tell(SequenceReleased(PULL_KEY))
    p.tell(SequenceReleased(key))
    assert p.take_reports() == [KVReleased(ONE)]


def test_an_attempt_released_while_its_pull_is_being_given_up(p: CoreUnderTest, key: SequenceKey) -> None:
    p.prefill_with_pull()
    p.prefix_held()
    p.stop_pull()
    assert p.release() == []
    assert p.tell(TransferCancelled(PULL)) == [*ALL_FREED, ReleaseSequence(key)]
    p.tell(SequenceReleased(key))
    assert p.take_reports() == [KVReleased(ONE)]


def test_the_lease_of_a_lost_router_ends_pulls_too(p: CoreUnderTest, key: SequenceKey) -> None:
    p.prefill_with_pull()
    p.prefix_held()
    p.now_s += 3.5
    reason = "nothing was heard from the router for longer than its lease"
    assert p.tell(Ticked()) == [CancelTransfer(PULL), CloseRouter(7, reason)]
    p.tell(TransferCancelled(PULL))
    p.tell(SequenceReleased(key))
    assert p.take_reports() == []
    assert p.core.num_attempts == p.core.num_open_transfers == 0


def test_a_dead_engine_leaves_no_pull(p: CoreUnderTest) -> None:
    p.prefill_with_pull()
    p.prefix_held()
    assert p.tell(EngineDied("it raised")) == [CancelTransfer(PULL)]
    assert p.tell(TransferCancelled(PULL)) == []
    assert p.core.num_attempts == p.core.num_open_transfers == 0


def test_the_id_of_a_pull_is_no_other_attempts(p: CoreUnderTest) -> None:
    p.prefill_with_pull()
    assert p.send_prefix() == [CloseRouter(7, "attempt 9 was started twice")]
