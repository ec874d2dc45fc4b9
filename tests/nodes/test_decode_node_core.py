"""The life of an attempt on a decode node, told as transcripts: state x command or fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from kvrelay.core.block_hash import root_hash, sequence_digest
from kvrelay.core.errors import Overloaded
from kvrelay.core.ids import AttemptId, BlockId, TransferId
from kvrelay.core.node_messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptRefused,
    HandoffVerified,
    KVReleased,
    Reserved,
)
from kvrelay.core.request import FinishReason, TokenLogprobs, TokenRequest
from kvrelay.engine.interface import SequenceFailure, SequenceKey, SequenceOutput, StepOutput
from kvrelay.kv_transfer.interface import ExpectedTransfer
from kvrelay.node.attempt import AttemptState
from kvrelay.node.events import (
    CancelTransfer,
    DrainTimedOut,
    EngineDied,
    ExpectTransfer,
    ReleaseSequence,
    ReserveSequence,
    RouterStreamLost,
    SendFrame,
    SequenceRefused,
    SequenceReleased,
    StartDecode,
    StepFinished,
    Ticked,
    TransferCancelled,
)

if TYPE_CHECKING:
    from tests.nodes.conftest import CoreUnderTest

ONE = AttemptId(1)


def decode(d: CoreUnderTest) -> None:
    d.reserve()
    d.reserved()
    d.receive_done()
    d.take_reports()


def test_a_whole_attempt_from_reservation_to_the_last_token(
    d: CoreUnderTest, key: SequenceKey, transfer_id: TransferId, request_of: Callable[..., TokenRequest]
) -> None:
    request = request_of(5)
    assert d.reserve() == [ReserveSequence(key, request)]
    digest = sequence_digest(request.token_ids, root_hash(b"", b"fingerprint"))
    expected = ExpectedTransfer(transfer_id, (BlockId(3),), 5, 2, digest)
    assert d.reserved(num_cached_tokens=2) == [ExpectTransfer(expected)]
    assert d.take_reports() == [Reserved(ONE, 2)]
    assert d.core.num_open_transfers == 1
    assert d.receive_done() == [StartDecode(key, 42)]
    assert d.take_reports() == [HandoffVerified(ONE, 640, 2, 0.5, "memory")]
    assert d.core.num_open_transfers == 0
    assert d.token(index=1, token_id=10) == []
    assert d.token(index=2, token_id=11, finish=FinishReason.LENGTH) == []
    assert d.tokens == [(7, 1, 1, 10), (7, 1, 2, 11)]
    assert d.take_reports() == [AttemptFinished(ONE, FinishReason.LENGTH)]
    assert d.core.num_attempts == 0


def test_the_last_token_and_the_end_are_in_one_frame(d: CoreUnderTest, key: SequenceKey) -> None:
    decode(d)
    last = SequenceOutput(key, 1, 5, FinishReason.STOP)
    [frame] = d.core.handle(StepFinished(StepOutput((last,))), d.now_s)
    assert isinstance(frame, SendFrame)
    assert frame.tokens is not None
    assert frame.tokens.token_ids == [5]
    assert frame.reports == (AttemptFinished(ONE, FinishReason.STOP),)


def test_a_step_of_many_attempts_is_one_frame_with_logprobs_where_asked(d: CoreUnderTest) -> None:
    keys = []
    for attempt in (1, 2, 3):
        d.reserve(attempt)
        d.reserved(attempt)
        d.receive_done(attempt)
        keys += [key for key in (d.core.states()) if key.attempt == attempt]
    logprobs = TokenLogprobs(-0.5)
    outputs = tuple(
        SequenceOutput(key_of_id(id_), 1, 9, None, logprobs if id_.attempt == 2 else None) for id_ in keys
    )
    [frame] = d.core.handle(StepFinished(StepOutput(outputs)), d.now_s)
    assert isinstance(frame, SendFrame)
    assert frame.tokens is not None
    assert frame.tokens.attempts == [1, 2, 3]
    assert frame.tokens.logprobs == [None, logprobs, None]


def key_of_id(transfer_id: TransferId) -> SequenceKey:
    return SequenceKey(str(transfer_id))


def test_a_refused_reservation_is_refused_and_holds_nothing(d: CoreUnderTest, key: SequenceKey) -> None:
    d.reserve()
    assert d.tell(SequenceRefused(key, Overloaded("no room"))) == []
    assert d.take_reports() == [AttemptRefused(ONE, "OVERLOADED", "no room")]
    assert d.core.num_attempts == 0


@pytest.mark.parametrize("outcome", ["reserved", "refused"])
def test_release_while_reserving_frees_behind_the_reservation(
    d: CoreUnderTest, key: SequenceKey, outcome: str
) -> None:
    d.reserve()
    assert d.release() == [ReleaseSequence(key)]
    if outcome == "reserved":
        assert d.reserved() == []
    else:
        assert d.tell(SequenceRefused(key, Overloaded("no room"))) == []
    assert d.take_reports() == []
    d.tell(SequenceReleased(key))
    assert d.take_reports() == [KVReleased(ONE)]


def test_release_while_receiving_waits_for_the_cancel_before_it_frees(
    d: CoreUnderTest, key: SequenceKey, transfer_id: TransferId
) -> None:
    d.reserve()
    d.reserved()
    d.take_reports()
    assert d.release() == [CancelTransfer(transfer_id)]
    assert d.state() is AttemptState.CANCELLING
    assert d.release() == []
    assert d.receive_done() == []
    assert d.receive_failed() == []
    assert d.take_reports() == []
    assert d.tell(TransferCancelled(transfer_id)) == [ReleaseSequence(key)]
    assert d.take_reports() == []
    d.tell(SequenceReleased(key))
    assert d.take_reports() == [KVReleased(ONE)]


def test_release_while_decoding_frees_and_drops_later_tokens(d: CoreUnderTest, key: SequenceKey) -> None:
    decode(d)
    assert d.release() == [ReleaseSequence(key)]
    assert d.token(index=1, finish=FinishReason.STOP) == []
    assert d.tokens == []
    assert d.take_reports() == []
    d.tell(SequenceReleased(key))
    assert d.take_reports() == [KVReleased(ONE)]


def test_a_failed_transfer_frees_the_blocks_then_fails_the_attempt(
    d: CoreUnderTest, key: SequenceKey
) -> None:
    d.reserve()
    d.reserved()
    d.take_reports()
    assert d.receive_failed() == [ReleaseSequence(key)]
    assert d.take_reports() == []
    d.tell(SequenceReleased(key))
    assert d.take_reports() == [AttemptFailed(ONE, "TRANSFER_FAILED", "link lost")]


def test_a_sequence_that_the_engine_gives_up_fails_the_attempt(d: CoreUnderTest, key: SequenceKey) -> None:
    decode(d)
    failed = StepFinished(StepOutput(failures=(SequenceFailure(key, "wrong KV"),)))
    assert d.tell(failed) == []
    assert d.take_reports() == [AttemptFailed(ONE, "ENGINE_FAILED", "wrong KV")]
    assert d.core.num_attempts == 0


def test_a_failure_that_is_the_requests_fault_names_its_field(d: CoreUnderTest, key: SequenceKey) -> None:
    decode(d)
    stuck = SequenceFailure(key, "too many states", "sampling.grammar")
    d.tell(StepFinished(StepOutput(failures=(stuck,))))
    assert d.take_reports() == [AttemptFailed(ONE, "INVALID_REQUEST", "too many states", "sampling.grammar")]


def test_release_of_an_unknown_attempt_is_answered(d: CoreUnderTest) -> None:
    assert d.release(9) == []
    assert d.take_reports() == [KVReleased(AttemptId(9))]


@pytest.mark.parametrize("state", ["reserving", "receiving", "decoding"])
def test_drain_time_out_hands_back_in_every_state(
    d: CoreUnderTest, key: SequenceKey, transfer_id: TransferId, state: str
) -> None:
    d.reserve()
    if state != "reserving":
        d.reserved()
    if state == "decoding":
        d.receive_done()
    d.take_reports()
    effects = d.tell(DrainTimedOut())
    if state == "receiving":
        assert effects == [CancelTransfer(transfer_id)]
        effects = d.tell(TransferCancelled(transfer_id))
    assert effects == [ReleaseSequence(key)]
    d.tell(SequenceReleased(key))
    [report] = d.take_reports()
    assert isinstance(report, AttemptFailed)
    assert report.code == "NODE_UNAVAILABLE"


@pytest.mark.parametrize("state", ["reserving", "receiving", "decoding"])
def test_lease_of_a_lost_router_frees_in_every_state_without_a_word(
    d: CoreUnderTest, key: SequenceKey, transfer_id: TransferId, state: str
) -> None:
    d.reserve()
    if state != "reserving":
        d.reserved()
    if state == "decoding":
        d.receive_done()
    d.take_reports()
    d.tell(RouterStreamLost(7))
    d.now_s += 2.9
    assert d.tell(Ticked()) == []
    d.now_s += 0.2
    effects = d.tell(Ticked())
    if state == "receiving":
        assert effects == [CancelTransfer(transfer_id)]
        effects = d.tell(TransferCancelled(transfer_id))
    assert effects == [ReleaseSequence(key)]
    d.tell(SequenceReleased(key))
    assert d.take_reports() == []
    assert d.core.num_attempts == 0


def test_tokens_of_a_lost_router_are_dropped_and_its_sequence_still_ends(d: CoreUnderTest) -> None:
    decode(d)
    d.tell(RouterStreamLost(7))
    d.token(index=1, finish=FinishReason.STOP)
    assert d.tokens == []
    assert d.take_reports() == []
    assert d.core.num_attempts == 0


def test_a_dead_engine_fails_every_attempt(d: CoreUnderTest, transfer_id: TransferId) -> None:
    d.reserve(1)
    d.reserved(1)
    d.reserve(2)
    d.take_reports()
    assert d.tell(EngineDied("boom")) == [CancelTransfer(transfer_id)]
    assert d.take_reports() == [
        AttemptFailed(ONE, "ENGINE_FAILED", "boom"),
        AttemptFailed(AttemptId(2), "ENGINE_FAILED", "boom"),
    ]
    assert d.core.num_attempts == 0
