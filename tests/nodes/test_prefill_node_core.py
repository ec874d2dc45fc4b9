"""The life of an attempt on a prefill node, told as transcripts: state x command or fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from kvrelay.core.block_hash import root_hash, sequence_digest
from kvrelay.core.errors import InvalidRequest, Overloaded
from kvrelay.core.ids import AttemptId, TransferId
from kvrelay.core.node_messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptRefused,
    KVReleased,
    PrefillFinished,
    StartPrefill,
)
from kvrelay.core.request import FinishReason, TokenRequest
from kvrelay.engine.interface import SequenceFailure, SequenceKey, StepOutput
from kvrelay.kv_transfer.interface import PushSpec
from kvrelay.node.attempt import AttemptState
from kvrelay.node.events import (
    CancelTransfer,
    CloseRouter,
    DrainTimedOut,
    EngineDied,
    FinishPush,
    OpenPush,
    PrefillStarted,
    ReleaseSequence,
    SequenceRefused,
    SequenceReleased,
    StepFinished,
    SubmitPrefill,
    Ticked,
    TransferCancelled,
)

if TYPE_CHECKING:
    from tests.nodes.conftest import CoreUnderTest

ONE = AttemptId(1)


def test_push_is_opened_before_the_sequence_is_submitted(
    p: CoreUnderTest, key: SequenceKey, transfer_id: TransferId, request_of: Callable[..., TokenRequest]
) -> None:
    request = request_of(5)
    digest = sequence_digest(request.token_ids, root_hash(b"", b"fingerprint"))
    assert p.prefill() == [
        OpenPush(PushSpec(transfer_id, "d:1", 5, digest)),
        SubmitPrefill(key, request, transfer_id),
    ]
    assert p.take_reports() == []
    assert p.state() is AttemptState.PREFILLING


def test_a_whole_handoff_ends_with_one_release(
    p: CoreUnderTest, key: SequenceKey, transfer_id: TransferId
) -> None:
    p.prefill()
    p.now_s += 1.0
    p.tell(PrefillStarted(key, p.now_s, 16))
    p.now_s += 0.25
    assert p.token(token_id=42) == [FinishPush(transfer_id, 42)]
    assert p.tokens == [(7, 1, 0, 42)]
    assert p.take_reports() == [PrefillFinished(ONE, 16, 1.0, 0.25)]
    assert p.state() is AttemptState.HANDING_OFF
    assert p.push_done() == [ReleaseSequence(key)]
    assert p.take_reports() == []
    assert p.tell(SequenceReleased(key)) == []
    assert p.take_reports() == [KVReleased(ONE)]
    assert p.core.num_attempts == p.core.num_open_transfers == 0


def test_a_first_token_that_finishes_goes_out_at_once_and_the_end_is_told_when_all_is_freed(
    p: CoreUnderTest, key: SequenceKey, transfer_id: TransferId
) -> None:
    p.prefill()
    assert p.token(finish=FinishReason.STOP) == [CancelTransfer(transfer_id)]
    assert p.tokens == [(7, 1, 0, 42)]
    assert [type(report) for report in p.take_reports()] == [PrefillFinished]
    assert p.tell(TransferCancelled(transfer_id)) == [ReleaseSequence(key)]
    p.tell(SequenceReleased(key))
    assert p.take_reports() == [AttemptFinished(ONE, FinishReason.STOP)]
    assert p.core.num_attempts == 0


@pytest.mark.parametrize("has_token", [False, True], ids=["prefilling", "handing_off"])
def test_release_cancels_the_push_then_frees_then_answers(
    p: CoreUnderTest, key: SequenceKey, transfer_id: TransferId, has_token: bool
) -> None:
    p.prefill()
    if has_token:
        p.token()
        p.take_reports()
    assert p.release() == [CancelTransfer(transfer_id)]
    assert p.take_reports() == []
    assert p.tell(TransferCancelled(transfer_id)) == [ReleaseSequence(key)]
    assert p.take_reports() == []
    p.tell(SequenceReleased(key))
    assert p.take_reports() == [KVReleased(ONE)]


@pytest.mark.parametrize("has_token", [False, True], ids=["prefilling", "handing_off"])
def test_a_failed_push_frees_the_kv_then_fails_the_attempt(
    p: CoreUnderTest, key: SequenceKey, has_token: bool
) -> None:
    p.prefill()
    if has_token:
        p.token()
        p.take_reports()
    assert p.push_failed() == [ReleaseSequence(key)]
    assert p.take_reports() == []
    p.tell(SequenceReleased(key))
    assert p.take_reports() == [AttemptFailed(ONE, "TRANSFER_FAILED", "link lost")]


def test_a_token_that_comes_after_the_release_is_dropped(p: CoreUnderTest, transfer_id: TransferId) -> None:
    p.prefill()
    p.release()
    assert p.token() == []
    p.tell(TransferCancelled(transfer_id))
    assert p.token() == []
    assert p.tokens == []


def test_a_push_that_ends_while_it_is_being_cancelled_changes_nothing(
    p: CoreUnderTest, key: SequenceKey, transfer_id: TransferId
) -> None:
    p.prefill()
    p.token()
    p.release()
    assert p.push_done() == []
    assert p.push_failed() == []
    p.tell(TransferCancelled(transfer_id))
    p.take_reports()
    p.tell(SequenceReleased(key))
    assert p.take_reports() == [KVReleased(ONE)]


@pytest.mark.parametrize("error", [Overloaded("full"), InvalidRequest("bad", field="prompt_token_ids")])
def test_what_the_engine_refuses_is_refused_after_its_push_is_cancelled(
    p: CoreUnderTest, key: SequenceKey, transfer_id: TransferId, error: Overloaded | InvalidRequest
) -> None:
    p.prefill()
    assert p.tell(SequenceRefused(key, error)) == [CancelTransfer(transfer_id)]
    p.tell(TransferCancelled(transfer_id))
    p.tell(SequenceReleased(key))
    assert p.take_reports() == [AttemptRefused(ONE, error.code, error.message, error.field or "")]


def test_a_sequence_that_the_engine_gives_up_fails_the_attempt(
    p: CoreUnderTest, key: SequenceKey, transfer_id: TransferId
) -> None:
    p.prefill()
    failed = StepFinished(StepOutput(failures=(SequenceFailure(key, "nan"),)))
    assert p.tell(failed) == [CancelTransfer(transfer_id)]
    assert p.tell(failed) == []
    p.tell(TransferCancelled(transfer_id))
    p.tell(SequenceReleased(key))
    assert p.take_reports() == [AttemptFailed(ONE, "ENGINE_FAILED", "nan")]


def test_a_failure_that_is_the_requests_fault_names_its_field(
    p: CoreUnderTest, key: SequenceKey, transfer_id: TransferId
) -> None:
    p.prefill()
    stuck = SequenceFailure(key, "too many states", "sampling.grammar")
    p.tell(StepFinished(StepOutput(failures=(stuck,))))
    p.tell(TransferCancelled(transfer_id))
    p.tell(SequenceReleased(key))
    assert p.take_reports() == [AttemptFailed(ONE, "INVALID_REQUEST", "too many states", "sampling.grammar")]


def test_release_of_a_failing_attempt_is_answered_once(p: CoreUnderTest, key: SequenceKey) -> None:
    p.prefill()
    p.push_failed()
    assert p.release() == []
    p.tell(SequenceReleased(key))
    assert p.take_reports() == [KVReleased(ONE)]


def test_drain_time_out_hands_back_what_is_held(
    p: CoreUnderTest, key: SequenceKey, transfer_id: TransferId
) -> None:
    p.prefill()
    assert p.tell(DrainTimedOut()) == [CancelTransfer(transfer_id)]
    p.tell(TransferCancelled(transfer_id))
    p.tell(SequenceReleased(key))
    [report] = p.take_reports()
    assert isinstance(report, AttemptFailed)
    assert report.code == "NODE_UNAVAILABLE"


def test_a_dead_engine_fails_every_attempt_and_refuses_new_ones(
    p: CoreUnderTest, transfer_id: TransferId
) -> None:
    p.prefill(1)
    assert p.tell(EngineDied("the engine raised")) == [CancelTransfer(transfer_id)]
    assert p.take_reports() == [AttemptFailed(ONE, "ENGINE_FAILED", "the engine raised")]
    assert p.tell(TransferCancelled(transfer_id)) == []
    assert p.prefill(2) == []
    assert p.take_reports() == [AttemptRefused(AttemptId(2), "ENGINE_FAILED", "the engine raised")]


def test_lease_of_a_lost_router_frees_without_a_word(
    p: CoreUnderTest, key: SequenceKey, transfer_id: TransferId
) -> None:
    p.prefill()
    p.now_s += 3.5
    assert p.tell(Ticked()) == [CancelTransfer(transfer_id), CloseRouter(7, LEASE_REASON)]
    p.tell(TransferCancelled(transfer_id))
    p.tell(SequenceReleased(key))
    assert p.take_reports() == []
    assert p.core.num_attempts == 0


LEASE_REASON = "nothing was heard from the router for longer than its lease"


def test_a_command_for_the_other_role_is_refused_by_name(p: CoreUnderTest) -> None:
    assert p.reserve() == []
    [report] = p.take_reports()
    assert isinstance(report, AttemptRefused)
    assert report.code == "INVALID_REQUEST"
    assert "prefill node" in report.message


def test_an_attempt_that_is_started_twice_closes_the_stream(
    p: CoreUnderTest, request_of: Callable[..., TokenRequest]
) -> None:
    p.prefill()
    assert p.command(StartPrefill(ONE, request_of(3), "d:1")) == [
        CloseRouter(7, "attempt 1 was started twice")
    ]
    assert p.state() is AttemptState.PREFILLING
