"""The pure parts: slots, ranges, coverage, and both sessions as transcripts without sockets or threads."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.core.block_hash import BlockHash
from kvrelay.core.errors import ConfigError, Overloaded, TransferCorrupt, TransferFailed
from kvrelay.core.ids import AttemptId, BlockId, TransferId
from kvrelay.core.kv import DeviceKind, KVFingerprint, KVLayout
from kvrelay.kv_transfer.config import KVTransferConfig, StagingSlots
from kvrelay.kv_transfer.interface import ExpectedTransfer, PushSpec
from kvrelay.kv_transfer.kv_range import MAX_READY_RANGES, Coverage, KVRange, ReadyQueue
from kvrelay.kv_transfer.messages import (
    Abort,
    Ack,
    Chunk,
    Finish,
    Grant,
    Offer,
    Released,
    SlotsGranted,
    SlotsReturned,
    Want,
)
from kvrelay.kv_transfer.offer_book import OfferBook
from kvrelay.kv_transfer.peer_error import peer_error
from kvrelay.kv_transfer.push_events import (
    FinishRequested,
    KVReported,
    LinkOpened,
    OfferGranted,
    PushAborted,
    PushAcked,
    PushGivenUp,
    PushLinkLost,
    PushTicked,
    RemoteSlotsGranted,
    ReportPush,
    SendToReceiver,
    WriteFinished,
    WriteMessage,
)
from kvrelay.kv_transfer.push_session import PushPhase, PushSession
from kvrelay.kv_transfer.receive_events import (
    ChunkArrived,
    FinishArrived,
    FreeSlots,
    MessageScattered,
    OfferMatched,
    QuarantineSlots,
    ReceiveAborted,
    ReceiveGivenUp,
    ReceiveLinkLost,
    ReportReceive,
    RequestSlots,
    ScatterMessage,
    SendToSender,
    SlotsAssigned,
    SlotsGivenBack,
    SlotsWanted,
)
from kvrelay.kv_transfer.receive_session import ReceiveSession
from kvrelay.kv_transfer.slot_pool import SlotCounts, SlotPool

LAYOUT = KVLayout(4, 64, 16, 2, 8, "float32", 4)
UNIT_BYTES = LAYOUT.token_bytes_per_layer
FINGERPRINT = KVFingerprint("m", "float32", 4, 2, 8, "r")
ID = TransferId(1, AttemptId(1))
DIGEST = BlockHash(b"d" * 32)
TABLE = tuple(BlockId(block) for block in range(8))


def whole(tokens: range, layers: range = range(4)) -> KVRange:
    return KVRange(layers, tokens)


# Slots


def test_free_slots_go_round_the_waiting_holders() -> None:
    pool: SlotPool[str] = SlotPool(3)
    pool.request("hog", 5)
    pool.request("late", 1)
    assert [holder for holder, _ in pool.grant()] == ["hog", "late", "hog"]
    assert pool.grant() == []
    pool.free(pool.slots_of("late")[0])
    assert [holder for holder, _ in pool.grant()] == ["hog"]


def test_a_quarantined_slot_is_free_only_after_its_time_or_its_release() -> None:
    pool: SlotPool[str] = SlotPool(2)
    pool.request("timed", 1)
    pool.request("confirmed", 1)
    pool.grant()
    pool.quarantine("timed", 5.0)
    pool.quarantine("confirmed", None)
    pool.request("next", 2)
    pool.expire(4.9)
    assert pool.grant() == []
    assert pool.counts == SlotCounts(free=0, held=0, quarantined=2)
    pool.expire(5.0)
    assert len(pool.grant()) == 1
    pool.expire(1e9)
    assert pool.grant() == []
    pool.release("confirmed")
    assert len(pool.grant()) == 1


@given(st.lists(st.tuples(st.sampled_from("rgfqxw"), st.sampled_from("abc")), max_size=60))
def test_a_pool_never_loses_or_doubles_a_slot(steps: list[tuple[str, str]]) -> None:
    pool: SlotPool[str] = SlotPool(4)
    for now_s, (step, holder) in enumerate(steps):
        match step:
            case "r":
                pool.request(holder, 2)
            case "g":
                pool.grant()
            case "f":
                for slot in pool.slots_of(holder)[:1]:
                    pool.free(slot)
            case "q":
                pool.quarantine(holder, now_s + 3.0)
            case "x":
                pool.expire(now_s)
            case _:
                pool.release(holder)
        counts = pool.counts
        assert counts.free + counts.held + counts.quarantined == 4
        assert min(counts.free, counts.held, counts.quarantined) >= 0


# Ranges


@given(
    st.integers(1, 40),
    st.integers(0, 40),
    st.integers(1, 20),
    st.lists(st.integers(1, 39), max_size=4),
    st.sampled_from([1, 2, 4]),
    st.randoms(),
)
def test_what_is_taken_covers_everything_once_in_order_and_fits(
    num_tokens: int, first_token: int, slot_units: int, cuts: list[int], group: int, random: Any
) -> None:
    first_token = min(first_token, num_tokens)
    queue, coverage = ReadyQueue(LAYOUT), Coverage(4, first_token, num_tokens)
    edges = sorted({0, num_tokens, *(cut for cut in cuts if cut < num_tokens)})
    queue.drop_below(first_token)
    for start, stop in pairwise(edges):
        for layer in range(0, 4, group):
            queue.add(whole(range(start, stop), range(layer, layer + group)))
            if random.random() < 0.3 and (part := queue.take(slot_units * UNIT_BYTES)):
                assert part.num_bytes(LAYOUT) <= slot_units * UNIT_BYTES
                coverage.add(part)
    while part := queue.take(slot_units * UNIT_BYTES):
        assert part.num_bytes(LAYOUT) <= slot_units * UNIT_BYTES
        coverage.add(part)
    assert coverage.missing() == ""


def test_layer_groups_and_token_chunks_join_into_one_message() -> None:
    queue = ReadyQueue(LAYOUT)
    for tokens in (range(0, 5), range(5, 9)):
        for layers in (range(0, 2), range(2, 4)):
            queue.add(whole(tokens, layers))
    assert queue.take(1 << 20) == whole(range(0, 9))
    assert not queue


def test_dropping_below_the_first_token_cuts_what_waits() -> None:
    queue = ReadyQueue(LAYOUT)
    queue.add(whole(range(0, 5), range(0, 2)))
    queue.add(whole(range(0, 9), range(2, 4)))
    queue.drop_below(6)
    assert queue.take(1 << 20) == whole(range(6, 9), range(2, 4))


def test_the_ready_queue_is_bounded() -> None:
    queue = ReadyQueue(LAYOUT)
    for token in range(MAX_READY_RANGES):
        queue.add(whole(range(2 * token, 2 * token + 1)))
    with pytest.raises(Overloaded):
        queue.add(whole(range(10**6, 10**6 + 1)))


@pytest.mark.parametrize(
    "part",
    [
        whole(range(0, 3)),
        whole(range(6, 8)),
        whole(range(4, 6)),
        whole(range(5, 11)),
        whole(range(5, 6), range(3, 5)),
    ],
)
def test_coverage_refuses_what_comes_twice_too_early_or_outside(part: KVRange) -> None:
    coverage = Coverage(4, 2, 10)
    coverage.add(whole(range(2, 5)))
    with pytest.raises(TransferCorrupt):
        coverage.add(part)
    coverage.add(whole(range(5, 10)))
    assert coverage.missing() == ""


# Sending


def make_push(now_s: float = 0.0, window: int = 2) -> PushSession:
    spec = PushSpec(ID, "decode:1", 10, DIGEST)
    return PushSession(
        spec,
        LAYOUT,
        FINGERPRINT.digest,
        slots_per_transfer=window,
        progress_timeout_s=5.0,
        now_s=now_s,
    )


def test_a_push_from_offer_to_acknowledgement() -> None:
    push = make_push()
    offer = Offer(ID, 10, DIGEST, FINGERPRINT.digest, 0)
    assert push.handle(LinkOpened(20 * UNIT_BYTES), 0.0) == [SendToReceiver(offer)]
    assert push.handle(KVReported(TABLE, whole(range(10))), 0.1) == []
    assert push.handle(OfferGranted(first_token=4), 0.2) == [SendToReceiver(Want(ID, 2))]
    first = WriteMessage(0, 7, TABLE, whole(range(4, 9)), 20 * UNIT_BYTES)
    second = WriteMessage(1, 3, TABLE, whole(range(9, 10)), 4 * UNIT_BYTES)
    assert push.handle(RemoteSlotsGranted((7,)), 0.3) == [first]
    assert push.handle(RemoteSlotsGranted((3,)), 0.4) == [second]
    # The second write ends first; what the receiver hears is in order all the same.
    assert push.handle(WriteFinished(1, 22), 0.5) == []
    chunks = push.handle(WriteFinished(0, 11), 0.6)
    assert chunks == [
        SendToReceiver(Chunk(ID, 0, 7, range(4), range(4, 9), 20 * UNIT_BYTES, True, 11)),
        SendToReceiver(Chunk(ID, 1, 3, range(4), range(9, 10), 4 * UNIT_BYTES, True, 22)),
    ]
    assert push.handle(FinishRequested(99), 0.7) == [SendToReceiver(Finish(ID, 2, 24 * UNIT_BYTES, 99))]
    (report,) = push.handle(PushAcked(), 1.2)
    assert report == ReportPush(None, 24 * UNIT_BYTES, 2, pytest.approx(1.0))
    assert push.phase is PushPhase.ENDED


def pushing(window: int = 2) -> PushSession:
    push = make_push(window=window)
    push.handle(LinkOpened(20 * UNIT_BYTES), 0.0)
    push.handle(OfferGranted(0), 0.0)
    return push


def test_slots_without_use_go_back() -> None:
    push = pushing()
    push.handle(KVReported(TABLE, whole(range(0, 3), range(0, 2))), 0.0)
    push.handle(KVReported(TABLE, whole(range(0, 2), range(2, 4))), 0.0)
    push.handle(KVReported(TABLE, whole(range(2, 3), range(2, 4))), 0.0)  # now all of it is one message
    effects = push.handle(RemoteSlotsGranted((0, 1)), 0.0)
    assert sum(isinstance(effect, WriteMessage) for effect in effects) == 1
    assert effects[-1] == SendToReceiver(SlotsReturned(ID, (1,)))


def test_a_cancelled_push_says_released_only_after_its_last_write() -> None:
    push = pushing()
    push.handle(KVReported(TABLE, whole(range(10))), 0.0)
    push.handle(RemoteSlotsGranted((0, 1)), 0.0)
    (abort,) = push.handle(PushGivenUp(None), 0.0)
    assert isinstance(abort, SendToReceiver)
    assert isinstance(abort.frame, Abort)
    assert push.handle(KVReported(TABLE, whole(range(10))), 0.0) == []
    assert push.handle(WriteFinished(0, 1), 0.0) == []
    assert push.handle(WriteFinished(1, None), 0.0) == [SendToReceiver(Released(ID))]
    assert push.phase is PushPhase.ENDED


def test_an_aborted_push_is_reported_once() -> None:
    push = pushing()
    error = TransferFailed("no")
    report, released = push.handle(PushAborted(error), 0.0)
    assert isinstance(report, ReportPush)
    assert report.error is error
    assert released == SendToReceiver(Released(ID))
    assert push.handle(PushLinkLost(TransferFailed("later")), 0.0) == []


def test_only_waiting_for_the_peer_times_out() -> None:
    push = pushing()
    assert push.handle(PushTicked(), 1000.0) == [], "the prefill may take its time"
    push.handle(KVReported(TABLE, whole(range(10))), 1000.0)
    assert push.handle(PushTicked(), 1004.9) == []
    abort, report, _released = push.handle(PushTicked(), 1005.0)
    assert isinstance(abort, SendToReceiver)
    assert isinstance(report, ReportPush)
    assert report.error is not None
    assert report.error.code == "TRANSFER_TIMEOUT"


@pytest.mark.parametrize("slots", [(0, 1, 2), (5, 5)])
def test_slots_that_were_not_asked_for_fail_the_push(slots: tuple[int, ...]) -> None:
    push = pushing()
    push.handle(KVReported(TABLE, whole(range(5))), 0.0)
    effects = push.handle(RemoteSlotsGranted(slots), 0.0)
    assert any(isinstance(effect, ReportPush) and effect.error for effect in effects)


def test_an_acknowledgement_before_the_end_is_no_success() -> None:
    effects = pushing().handle(PushAcked(), 0.0)
    (report,) = [effect for effect in effects if isinstance(effect, ReportPush)]
    assert isinstance(report.error, TransferCorrupt)


# Receiving


def make_receive() -> ReceiveSession:
    expected = ExpectedTransfer(ID, TABLE, 10, 4, DIGEST)
    return ReceiveSession(
        expected,
        LAYOUT,
        FINGERPRINT,
        slot_bytes=20 * UNIT_BYTES,
        slots_per_transfer=2,
        progress_timeout_s=5.0,
        now_s=0.0,
    )


def test_a_sender_with_the_larger_window_gets_the_slots_of_the_smaller_one_in_turn() -> None:
    receive = make_receive()
    offer = Offer(ID, 10, DIGEST, FINGERPRINT.digest, 3)
    assert receive.handle(OfferMatched(offer, FINGERPRINT), 0.0) == [
        SendToSender(Grant(ID, 4)),
        RequestSlots(2),
    ]
    receive.handle(SlotsAssigned((3, 0)), 0.0)
    assert receive.handle(SlotsWanted(1), 0.0) == []
    chunk = Chunk(ID, 0, 3, range(4), range(4, 6), 8 * UNIT_BYTES, False, 0)
    scatter = ScatterMessage(3, TABLE, whole(range(4, 6)), 8 * UNIT_BYTES, None)
    assert receive.handle(ChunkArrived(chunk), 0.0) == [scatter, RequestSlots(1)]
    assert receive.handle(SlotsGivenBack((0,)), 0.0) == [FreeSlots((0,)), RequestSlots(1)]
    assert receive.handle(SlotsAssigned((3, 0)), 0.0) == [SendToSender(SlotsGranted(ID, (3, 0)))]
    chunk = Chunk(ID, 1, 3, range(4), range(6, 8), 8 * UNIT_BYTES, False, 0)
    scatter = ScatterMessage(3, TABLE, whole(range(6, 8)), 8 * UNIT_BYTES, None)
    assert receive.handle(ChunkArrived(chunk), 0.0) == [scatter], "all that it wanted was granted"


def test_a_receive_from_offer_to_acknowledgement() -> None:
    receive = make_receive()
    offer = Offer(ID, 10, DIGEST, FINGERPRINT.digest, 0)
    assert receive.handle(OfferMatched(offer, FINGERPRINT), 0.0) == [SendToSender(Grant(ID, 4))]
    assert receive.handle(SlotsWanted(2), 0.0) == [RequestSlots(2)]
    assert receive.handle(SlotsAssigned((3, 0)), 0.0) == [SendToSender(SlotsGranted(ID, (3, 0)))]
    chunk = Chunk(ID, 0, 3, range(4), range(4, 9), 20 * UNIT_BYTES, True, 11)
    assert receive.handle(ChunkArrived(chunk), 0.0) == [
        ScatterMessage(3, TABLE, whole(range(4, 9)), 20 * UNIT_BYTES, 11)
    ]
    assert receive.handle(MessageScattered(), 0.0) == []
    last = Chunk(ID, 1, 0, range(4), range(9, 10), 4 * UNIT_BYTES, False, 0)
    assert receive.handle(ChunkArrived(last), 0.0) == [
        ScatterMessage(0, TABLE, whole(range(9, 10)), 4 * UNIT_BYTES, None)
    ]
    # The scatter may end after everything has come: nothing is acknowledged before.
    assert receive.handle(FinishArrived(Finish(ID, 2, 24 * UNIT_BYTES, 99)), 0.9) == []
    assert receive.handle(MessageScattered(), 1.0) == [
        SendToSender(Ack(ID)),
        FreeSlots(None),
        ReportReceive(None, 99, 10, 24 * UNIT_BYTES, 2, 1.0),
    ]


def storing() -> ReceiveSession:
    """All has come, a scatter is still under way."""
    receive = make_receive()
    receive.handle(OfferMatched(Offer(ID, 10, DIGEST, FINGERPRINT.digest, 2), FINGERPRINT), 0.0)
    receive.handle(SlotsAssigned((3, 0)), 0.0)
    receive.handle(ChunkArrived(Chunk(ID, 0, 3, range(4), range(4, 9), 20 * UNIT_BYTES, False, 0)), 0.0)
    receive.handle(ChunkArrived(Chunk(ID, 1, 0, range(4), range(9, 10), 4 * UNIT_BYTES, False, 0)), 0.0)
    receive.handle(MessageScattered(), 0.0)
    assert receive.handle(FinishArrived(Finish(ID, 2, 24 * UNIT_BYTES, 99)), 0.0) == []
    return receive


@pytest.mark.parametrize(
    "event",
    [
        FinishArrived(Finish(ID, 2, 24 * UNIT_BYTES, 99)),
        ChunkArrived(Chunk(ID, 2, 3, range(4), range(9, 10), 4 * UNIT_BYTES, False, 0)),
        ReceiveAborted(TransferFailed("the prefill died")),
        ReceiveLinkLost(TransferFailed("the cable was cut")),
    ],
    ids=lambda event: type(event).__name__,
)
def test_what_goes_wrong_before_the_last_scatter_ends_is_no_success(event: Any) -> None:
    receive = storing()
    (report,) = [effect for effect in receive.handle(event, 0.0) if isinstance(effect, ReportReceive)]
    assert report.error is not None
    assert receive.handle(MessageScattered(), 0.0) == []


def test_an_offer_asks_for_the_slots_of_what_is_ready() -> None:
    push = make_push(window=2)
    push.handle(KVReported(TABLE, whole(range(10))), 0.0)
    (offer,) = push.handle(LinkOpened(4 * UNIT_BYTES), 0.0)
    assert offer == SendToReceiver(Offer(ID, 10, DIGEST, FINGERPRINT.digest, 2))
    assert push.handle(OfferGranted(0), 0.0) == [], "two are asked for already"
    effects = push.handle(RemoteSlotsGranted((4, 5)), 0.0)
    assert [type(effect) for effect in effects] == [WriteMessage, WriteMessage]


def test_slots_that_an_offer_asked_for_in_vain_go_back() -> None:
    push = make_push()
    push.handle(KVReported(TABLE, whole(range(4))), 0.0)
    push.handle(LinkOpened(20 * UNIT_BYTES), 0.0)
    assert push.handle(OfferGranted(4), 0.0) == []
    assert push.handle(RemoteSlotsGranted((4,)), 0.0) == [SendToReceiver(SlotsReturned(ID, (4,)))]


def test_a_granted_offer_queues_for_the_slots_it_asks_for() -> None:
    offer = Offer(ID, 10, DIGEST, FINGERPRINT.digest, 2)
    assert make_receive().handle(OfferMatched(offer, FINGERPRINT), 0.0) == [
        SendToSender(Grant(ID, 4)),
        RequestSlots(2),
    ]


def test_a_sender_that_wants_more_slots_than_any_has_is_refused() -> None:
    receive = make_receive()
    receive.handle(OfferMatched(Offer(ID, 10, DIGEST, FINGERPRINT.digest, 4096), FINGERPRINT), 0.0)
    effects = receive.handle(SlotsWanted(1), 0.0)
    (report,) = [effect for effect in effects if isinstance(effect, ReportReceive)]
    assert isinstance(report.error, TransferCorrupt)


@pytest.mark.parametrize("finish", [Finish(ID, 1, 0, 9), Finish(ID, 0, 1, 9), Finish(ID, 0, 0, 9)])
def test_a_finish_that_does_not_add_up_is_never_acknowledged(finish: Finish) -> None:
    receive = make_receive()
    receive.handle(OfferMatched(Offer(ID, 10, DIGEST, FINGERPRINT.digest, 0), FINGERPRINT), 0.0)
    effects = receive.handle(FinishArrived(finish), 0.0)
    assert not any(isinstance(effect, SendToSender) and effect.frame == Ack(ID) for effect in effects)
    (report,) = [effect for effect in effects if isinstance(effect, ReportReceive)]
    assert isinstance(report.error, TransferCorrupt)


def test_giving_up_while_receiving_quarantines_and_tells_the_sender() -> None:
    receive = make_receive()
    receive.handle(OfferMatched(Offer(ID, 10, DIGEST, FINGERPRINT.digest, 0), FINGERPRINT), 0.0)
    abort, quarantine = receive.handle(ReceiveGivenUp(None), 0.0)
    assert isinstance(abort, SendToSender)
    assert isinstance(abort.frame, Abort)
    assert quarantine == QuarantineSlots()


# The rest


def test_offers_are_bounded_and_expire() -> None:
    book = OfferBook(max_pending=1, timeout_s=5.0)
    book.keep(Offer(ID, 10, DIGEST, FINGERPRINT.digest, 0), 1, 0.0)
    other = TransferId(1, AttemptId(2))
    with pytest.raises(Overloaded):
        book.keep(Offer(other, 10, DIGEST, FINGERPRINT.digest, 0), 1, 0.0)
    assert book.expire(4.9) == []
    assert [pending.offer.transfer_id for pending in book.expire(5.0)] == [ID]
    assert isinstance(book.ended_error(ID), TransferFailed)
    with pytest.raises(TransferFailed):
        book.keep(Offer(ID, 10, DIGEST, FINGERPRINT.digest, 0), 1, 6.0)


def test_a_peer_can_not_make_us_report_any_error() -> None:
    assert type(peer_error("INVALID_REQUEST", "x")) is TransferFailed
    assert type(peer_error("TRANSFER_CORRUPT", "x")) is TransferCorrupt


def test_default_slots_depend_on_where_the_kv_is() -> None:
    plain, given = KVTransferConfig(), KVTransferConfig(slot_bytes=100, num_send_slots=3)
    assert plain.slots(DeviceKind.CPU) == StagingSlots(4 << 20, 4, 8, 4)
    assert plain.slots(DeviceKind.CUDA) == StagingSlots(64 << 20, 8, 8, 8)
    assert given.slots(DeviceKind.CPU) == StagingSlots(100, 3, 8, 4)
    assert given.slots(DeviceKind.CUDA) == StagingSlots(100, 3, 8, 8)


def test_a_bad_config_lists_all_its_faults() -> None:
    with pytest.raises(ConfigError) as caught:
        KVTransferConfig(
            transport="pigeon", listen_host="0.0.0.0", num_send_slots=0, quarantine_s=0, listen_port=70000
        )
    message = caught.value.message
    for name in ("transport", "advertised_host", "num_send_slots", "quarantine_s", "listen_port"):
        assert name in message
