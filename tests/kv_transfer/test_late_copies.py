"""Stores whose copies are only queued when they begin, as on a GPU: what may happen before they are done.

The double moves the bytes when the copy ends, which is when the test lets it, or when somebody waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from kvrelay.core.errors import TransferCorrupt, TransferFailed
from kvrelay.core.ids import BlockId
from kvrelay.core.kv import FinishedCopy
from kvrelay.kv_transfer.choose_transport import choose_transport
from kvrelay.kv_transfer.interface import PushDone, PushFailed, ReceiveDone, ReceiveFailed
from kvrelay.kv_transfer.receive_session import ReceivePhase
from kvrelay.kv_transfer.transport import KVTransport, TransportContext


class LateCopy:
    def __init__(self, num_bytes: int, offset: int, move: Callable[[], FinishedCopy], store: Any) -> None:
        self.num_bytes = num_bytes
        self.span = range(offset, offset + num_bytes)
        self.is_over = False
        self._move = move
        self._store = store

    def is_done(self) -> bool:
        if self._store.is_failing:
            raise RuntimeError("the device is gone")
        if self._store.gate.is_set():
            self.wait()
        return self.is_over

    def wait(self) -> int:
        if self._store.is_failing:
            raise RuntimeError("the device is gone")
        if not self.is_over:
            self._move()
            self.is_over = True
        return self.num_bytes


def late_store(kv: Any, block_size: int) -> Any:
    class LateStore(kv.NumpyStore):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(block_size)
            self.gate = threading.Event()
            self.is_failing = False
            self.copies: list[LateCopy] = []

        @property
        def num_under_way(self) -> int:
            return sum(not copy.is_over for copy in list(self.copies))

        def gather(
            self, table: Sequence[BlockId], layers: range, tokens: range, out: Any, offset: int
        ) -> LateCopy:
            begin = super().gather
            return self._begin(layers, tokens, offset, lambda: begin(table, layers, tokens, out, offset))

        def scatter(
            self, table: Sequence[BlockId], layers: range, tokens: range, source: Any, offset: int
        ) -> LateCopy:
            begin = super().scatter
            return self._begin(layers, tokens, offset, lambda: begin(table, layers, tokens, source, offset))

        def _begin(
            self, layers: range, tokens: range, offset: int, move: Callable[[], FinishedCopy]
        ) -> LateCopy:
            num_bytes = len(layers) * len(tokens) * self.layout.token_bytes_per_layer
            copy = LateCopy(num_bytes, offset, move, self)
            for other in self.copies:
                assert other.is_over or not set(other.span) & set(copy.span), "a slot in use was given away"
            self.copies.append(copy)
            return copy

    return LateStore()


@pytest.fixture
async def late_pair(make_node: Any, kv: Any) -> tuple[Any, Any]:
    """Prefill and decode node; the copies of both are held up."""
    return (
        await make_node("prefill", store=late_store(kv, 16)),
        await make_node("decode", store=late_store(kv, 24)),
    )


async def reach(stage: str, handoff: Any, kv: Any) -> None:
    """Bring a transfer into the stage, with a copy under way that will not end by itself."""
    handoff.start()
    if stage == "gather":
        store = handoff.sender.store
    else:
        handoff.sender.store.gate.set()
        store = handoff.receiver.store
    await kv.eventually(lambda: store.num_under_way > 0, f"no {stage} began")


async def assert_pair_works(pair: Any, kv: Any) -> None:
    for node in pair:
        node.store.gate.set()
        await kv.eventually(lambda node=node: kv.at_rest(node), "slots leaked")
    handoff = kv.Handoff(*pair, num_tokens=100)
    handoff.start()
    pushed, received = await handoff.outcomes()
    assert isinstance(pushed, PushDone), pushed
    assert isinstance(received, ReceiveDone), received
    handoff.assert_equal()


async def test_several_copies_are_under_way_at_once_and_the_content_arrives(late_pair: Any, kv: Any) -> None:
    sender, receiver = late_pair
    handoffs = [kv.Handoff(*late_pair, num_tokens=100) for _ in range(3)]
    for handoff in handoffs:
        handoff.start()
    await kv.eventually(lambda: sender.store.num_under_way == 2, "not all send slots are gathered into")
    sender.store.gate.set()
    await kv.eventually(lambda: receiver.store.num_under_way == 3, "not all receive slots are scattered from")
    assert receiver.recorder.events == []
    receiver.store.gate.set()
    for handoff in handoffs:
        pushed, received = await handoff.outcomes()
        assert isinstance(pushed, PushDone), pushed
        assert isinstance(received, ReceiveDone), received
        handoff.assert_equal()
    await assert_pair_works(late_pair, kv)


async def test_nothing_is_done_before_the_last_scatter_is(late_pair: Any, kv: Any) -> None:
    sender, receiver = late_pair
    handoff = kv.Handoff(*late_pair, num_tokens=16)
    await reach("scatter", handoff, kv)
    sessions = receiver.service._owner._receiver._sessions
    await kv.eventually(
        lambda: sessions[handoff.transfer_id].phase is ReceivePhase.STORING, "the end did not come"
    )
    assert receiver.store.num_under_way == 2
    assert sender.recorder.events == receiver.recorder.events == []
    receiver.store.gate.set()
    await handoff.outcomes()
    handoff.assert_equal()


@pytest.mark.parametrize("stage", ["gather", "scatter"])
@pytest.mark.parametrize("cancelling", [0, 1])
async def test_no_block_is_touched_once_a_cancellation_is_confirmed(
    late_pair: Any, kv: Any, stage: str, cancelling: int
) -> None:
    handoff = kv.Handoff(*late_pair, num_tokens=100)
    await reach(stage, handoff, kv)
    node = late_pair[cancelling]
    await node.service.cancel(handoff.transfer_id)
    assert node.store.num_under_way == 0
    before = node.store.cache.copy()
    other = late_pair[1 - cancelling]
    event = await other.recorder.outcome(handoff.transfer_id)
    assert isinstance(event.error, TransferFailed)
    assert other.store.num_under_way == 0
    assert node.recorder.events == []
    for each in late_pair:
        await kv.eventually(lambda each=each: kv.at_rest(each), "slots leaked")
    np.testing.assert_array_equal(node.store.cache, before)
    await assert_pair_works(late_pair, kv)


@pytest.mark.parametrize("stage", ["gather", "scatter"])
@pytest.mark.parametrize("closing", [0, 1])
async def test_a_lost_link_ends_copies_before_the_failure_is_told(
    late_pair: Any, kv: Any, stage: str, closing: int
) -> None:
    handoff = kv.Handoff(*late_pair, num_tokens=100)
    await reach(stage, handoff, kv)
    await late_pair[closing].service.close()
    for node, kind in zip(late_pair, (PushFailed, ReceiveFailed), strict=True):
        event = await node.recorder.outcome(handoff.transfer_id)
        assert isinstance(event, kind)
        assert node.store.num_under_way == 0
    survivor = late_pair[1 - closing]
    await kv.eventually(lambda: kv.at_rest(survivor), "slots leaked")


@pytest.mark.parametrize("stage", ["gather", "scatter"])
async def test_a_timeout_ends_copies_before_it_is_told(make_node: Any, kv: Any, stage: str) -> None:
    limits = {"progress_timeout_s": 0.2, "pending_offer_timeout_s": 0.1}
    pair = (
        await make_node("prefill", store=late_store(kv, 16), **limits),
        await make_node("decode", store=late_store(kv, 24), **limits),
    )
    handoff = kv.Handoff(*pair, num_tokens=100)
    await reach(stage, handoff, kv)
    for node in pair:
        event = await node.recorder.outcome(handoff.transfer_id)
        assert event.error.code in ("TRANSFER_TIMEOUT", "TRANSFER_FAILED")
        assert node.store.num_under_way == 0
    await assert_pair_works(pair, kv)


class FlipsABitInTheSecond:
    """A transport that breaks the second message."""

    def __init__(self, context: TransportContext, transport: str) -> None:
        self._inner: KVTransport = choose_transport(transport, context).transport
        self._context = context
        self._num_writes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def post_write(self, link_id: int, local: int, remote: int, num_bytes: int) -> int:
        self._num_writes += 1
        if self._num_writes == 2:
            self._context.send_staging.host_view()[local] ^= 1
        return self._inner.post_write(link_id, local, remote, num_bytes)


async def test_a_corrupt_message_behind_one_that_is_being_scattered(
    make_node: Any, kv: Any, transport: str
) -> None:
    pair = (
        await make_node(
            "prefill",
            store=late_store(kv, 16),
            factory=lambda context: FlipsABitInTheSecond(context, transport),
        ),
        await make_node("decode", store=late_store(kv, 24)),
    )
    handoff = kv.Handoff(*pair, num_tokens=16)
    handoff.start()
    pair[0].store.gate.set()
    event = await pair[1].recorder.outcome(handoff.transfer_id)
    assert isinstance(event.error, TransferCorrupt)
    assert len(pair[1].store.copies) == 1
    assert pair[1].store.num_under_way == 0
    await assert_pair_works(pair, kv)


@pytest.mark.parametrize("stage", ["gather", "scatter"])
async def test_a_device_that_fails_ends_every_transfer(late_pair: Any, kv: Any, stage: str) -> None:
    handoff, other = kv.Handoff(*late_pair, num_tokens=100), kv.Handoff(*late_pair, num_tokens=10)
    other.expect()
    await reach(stage, handoff, kv)
    for node in late_pair:
        node.store.is_failing = True
    pushed, received = await handoff.outcomes()
    assert isinstance(pushed.error, TransferFailed)
    assert isinstance(received.error, TransferFailed)
    assert "the device is gone" in str((pushed if stage == "gather" else received).error)
    if stage == "scatter":
        event = await late_pair[1].recorder.outcome(other.transfer_id)
        assert "the device is gone" in str(event.error)
