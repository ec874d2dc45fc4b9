"""Ending transfers early: cancel and close, on either side, in every phase."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kvrelay.core.errors import TransferFailed
from kvrelay.kv_transfer.interface import PushFailed, ReceiveFailed

PHASES = ["before link", "offered", "granted", "pushing", "all but finished"]


async def reach(phase: str, handoff: Any, kv: Any) -> None:
    """Bring a transfer of 64 tokens into the phase."""
    sender, receiver = handoff.sender.service, handoff.receiver
    if phase == "before link":
        handoff.expect()
        handoff.open()
        return
    handoff.open()
    await kv.eventually(lambda: receiver.service.snapshot().num_pending_offers == 1, "no offer")
    if phase == "offered":
        return
    handoff.expect()
    if phase == "granted":
        await kv.eventually(lambda: receiver.service.snapshot().num_pending_offers == 0, "no match")
        return
    handoff.ready(range(32 if phase == "pushing" else 64))
    await kv.eventually(lambda: receiver.store.num_scatters >= 4, "nothing moved")
    assert sender.snapshot().num_pushes == 1


async def assert_pair_works(pair: Any, kv: Any) -> None:
    for node in pair:
        await kv.eventually(lambda node=node: kv.at_rest(node), "slots leaked")
    handoff = kv.Handoff(*pair, num_tokens=64)
    handoff.start()
    await handoff.outcomes()
    handoff.assert_equal()


@pytest.mark.parametrize("phase", PHASES)
async def test_the_sender_cancels(pair: Any, kv: Any, phase: str) -> None:
    handoff = kv.Handoff(*pair, num_tokens=64)
    await reach(phase, handoff, kv)
    sender, receiver = pair
    await sender.service.cancel(handoff.transfer_id)
    num_gathers = sender.store.num_gathers
    handoff.ready(range(32, 64))
    handoff.finish()
    if phase == "offered":
        handoff.expect()
    received = await receiver.recorder.outcome(handoff.transfer_id)
    assert isinstance(received.error, TransferFailed)
    assert "cancelled" in str(received.error)
    await assert_pair_works(pair, kv)
    assert [event for event in sender.recorder.events if event.transfer_id == handoff.transfer_id] == []
    assert sender.store.num_gathers == num_gathers + 8, "gathered for a cancelled transfer"


@pytest.mark.parametrize("phase", PHASES)
async def test_the_receiver_cancels(pair: Any, kv: Any, phase: str) -> None:
    handoff = kv.Handoff(*pair, num_tokens=64)
    await reach(phase, handoff, kv)
    sender, receiver = pair
    if phase == "offered":
        handoff.expect()
    await receiver.service.cancel(handoff.transfer_id)
    num_scatters = receiver.store.num_scatters
    pushed = await sender.recorder.outcome(handoff.transfer_id)
    assert isinstance(pushed, PushFailed)
    handoff.ready(range(32, 64))
    await assert_pair_works(pair, kv)
    assert [event for event in receiver.recorder.events if event.transfer_id == handoff.transfer_id] == []
    assert receiver.store.num_scatters == num_scatters + 8, "scattered for a cancelled transfer"


async def test_cancelling_in_the_thick_of_it_leaks_nothing(pair: Any, kv: Any) -> None:
    handoffs = [kv.Handoff(*pair, num_tokens=100) for _ in range(12)]
    for handoff in handoffs:
        handoff.start()
    await kv.eventually(lambda: pair[1].store.num_scatters >= 10, "nothing moved")
    for index, handoff in enumerate(handoffs):
        if index % 3 != 2:
            await pair[index % 3].service.cancel(handoff.transfer_id)
    for index, handoff in enumerate(handoffs):
        if index % 3 == 2:
            await handoff.outcomes()
            handoff.assert_equal()
    await assert_pair_works(pair, kv)


async def test_cancelling_an_ended_transfer_is_ignored(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=8)
    handoff.start()
    await handoff.outcomes()
    for node in pair:
        await node.service.cancel(handoff.transfer_id)


@pytest.mark.parametrize("closing", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
async def test_closing_ends_every_transfer_with_its_event(
    pair: Any, kv: Any, phase: str, closing: int
) -> None:
    handoff = kv.Handoff(*pair, num_tokens=64)
    await reach(phase, handoff, kv)
    if phase == "offered":
        handoff.expect()
    await pair[closing].service.close()
    mine = [event for event in pair[closing].recorder.events if event.transfer_id == handoff.transfer_id]
    assert [type(event) for event in mine] == [(PushFailed, ReceiveFailed)[closing]]
    other = pair[1 - closing]
    if phase == "before link":
        await other.service.cancel(handoff.transfer_id)
    else:
        event = await other.recorder.outcome(handoff.transfer_id)
        assert isinstance(event.error, TransferFailed)
    await kv.eventually(lambda: kv.at_rest(other), "slots leaked")


async def test_close_leaves_no_thread(make_node: Any, kv: Any) -> None:
    before = set(threading.enumerate())
    pair = await make_node("prefill"), await make_node("decode")
    handoff = kv.Handoff(*pair, num_tokens=8)
    handoff.start()
    await handoff.outcomes()
    assert len(set(threading.enumerate()) - before) == 2
    for node in pair:
        await node.service.close()
        await node.service.close()
    assert set(threading.enumerate()) <= before


async def test_calls_after_close_report_failure(make_node: Any, kv: Any) -> None:
    pair = await make_node("prefill"), await make_node("decode")
    for node in pair:
        await node.service.close()
    handoff = kv.Handoff(*pair, num_tokens=8)
    handoff.start()
    pushed, received = await handoff.outcomes()
    assert "closed" in str(pushed.error)
    assert "closed" in str(received.error)
