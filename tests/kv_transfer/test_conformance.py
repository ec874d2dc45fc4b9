"""What every transport must do, over real services in one process."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvrelay.core.block_hash import BlockHash
from kvrelay.core.errors import (
    DuplicateRequest,
    KVLayoutMismatch,
    Overloaded,
    TransferCorrupt,
    TransferFailed,
)
from kvrelay.core.ids import AttemptId, TransferId
from kvrelay.kv_transfer.interface import PushDone, PushFailed, ReceiveDone, ReceiveFailed


async def assert_at_rest(kv: Any, *nodes: Any) -> None:
    for node in nodes:
        await kv.eventually(lambda node=node: kv.at_rest(node), "slots leaked")


async def assert_done(kv: Any, handoff: Any) -> tuple[PushDone, ReceiveDone]:
    pushed, received = await handoff.outcomes()
    assert isinstance(pushed, PushDone), pushed
    assert isinstance(received, ReceiveDone), received
    handoff.assert_equal()
    return pushed, received


async def test_content_arrives_between_different_block_sizes(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=500)
    handoff.start()
    pushed, received = await assert_done(kv, handoff)
    assert received.output_token_id == 42
    assert received.stats.num_bytes == pushed.stats.num_bytes == 500 * 512
    assert received.stats.num_messages == pushed.stats.num_messages == -(-500 // 8)
    await assert_at_rest(kv, *pair)


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 24])
async def test_short_prompts_arrive(pair: Any, kv: Any, num_tokens: int) -> None:
    handoff = kv.Handoff(*pair, num_tokens=num_tokens)
    handoff.start()
    await assert_done(kv, handoff)


async def test_many_transfers_at_once_share_few_slots(pair: Any, kv: Any) -> None:
    handoffs = [kv.Handoff(*pair, num_tokens=20 + 7 * index) for index in range(24)]
    for handoff in handoffs:
        handoff.start()
    for handoff in handoffs:
        await assert_done(kv, handoff)
    await assert_at_rest(kv, *pair)


async def test_both_directions_at_once(pair: Any, kv: Any) -> None:
    there, back = kv.Handoff(*pair, num_tokens=300), kv.Handoff(*reversed(pair), num_tokens=300)
    there.start()
    back.start()
    await assert_done(kv, there)
    await assert_done(kv, back)


async def test_slots_smaller_than_a_token_of_all_layers(make_node: Any, kv: Any) -> None:
    sender = await make_node("prefill", 16, slot_bytes=300)
    receiver = await make_node("decode", 24, slot_bytes=200)
    handoff = kv.Handoff(sender, receiver, num_tokens=30)
    handoff.start()
    _, received = await assert_done(kv, handoff)
    assert received.stats.num_messages == 30 * kv.NUM_LAYERS  # 128 bytes each: one token of one layer


async def test_only_the_missing_suffix_moves(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=100, first_token=72)
    handoff.start()
    _, received = await assert_done(kv, handoff)
    assert received.stats.num_bytes == 28 * 512
    untouched = pair[1].store.read(handoff.received_blocks, range(4), range(72))
    assert not untouched.any()


async def test_chunked_prefill_in_layer_groups(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=100, first_token=10)
    handoff.expect()
    handoff.open()
    for chunk in (range(0, 33), range(33, 64), range(64, 100)):
        for layers in (range(0, 1), range(1, 3), range(3, 4)):
            handoff.ready(chunk, layers)
            await asyncio.sleep(0)
    handoff.finish()
    await assert_done(kv, handoff)
    await assert_at_rest(kv, *pair)


async def test_reports_from_an_engine_thread(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=200)
    handoff.expect()
    handoff.open()

    def compute() -> None:
        for token in range(200):
            handoff.ready(range(token, token + 1))

    engine = threading.Thread(target=compute)
    engine.start()
    await asyncio.to_thread(engine.join)
    handoff.finish()
    await assert_done(kv, handoff)


async def test_kv_moves_while_the_prefill_still_computes(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=64)
    handoff.expect()
    handoff.open()
    handoff.ready(range(0, 32))
    await kv.eventually(lambda: pair[1].store.num_scatters >= 4, "nothing moved before the end")
    handoff.ready(range(32, 64))
    handoff.finish()
    await assert_done(kv, handoff)


async def test_ready_ranges_are_joined_into_full_messages(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=64)
    handoff.open()
    for token in range(64):
        handoff.ready(range(token, token + 1))
    handoff.finish()
    reported = threading.Event()
    pair[0].service._reactor.post(reported.set)  # behind all that was reported
    assert await asyncio.to_thread(reported.wait, 30)
    handoff.expect()
    _, received = await assert_done(kv, handoff)
    assert received.stats.num_messages == 8


async def test_an_offer_waits_until_it_is_expected(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=40)
    handoff.open()
    handoff.ready(range(40))
    handoff.finish()
    receiver = pair[1].service
    await kv.eventually(lambda: receiver.snapshot().num_pending_offers == 1, "no offer came")
    handoff.expect()
    await assert_done(kv, handoff)


async def test_an_expected_transfer_waits_for_its_offer(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=40)
    handoff.expect()
    await kv.eventually(lambda: pair[1].service.snapshot().num_receives == 1, "not expected")
    handoff.open()
    handoff.ready(range(40))
    handoff.finish()
    await assert_done(kv, handoff)


async def test_an_offer_that_nobody_expects_is_refused(make_node: Any, kv: Any) -> None:
    pair = await make_node("prefill"), await make_node("decode", pending_offer_timeout_s=0.05)
    handoff = kv.Handoff(*pair, num_tokens=40)
    handoff.open()
    pushed = await pair[0].recorder.outcome(handoff.transfer_id)
    assert isinstance(pushed, PushFailed)
    assert "nobody expected" in str(pushed.error)
    await assert_at_rest(kv, *pair)


async def test_too_many_offers_are_refused(make_node: Any, kv: Any) -> None:
    pair = await make_node("prefill"), await make_node("decode", max_pending_offers=2)
    handoffs = [kv.Handoff(*pair, num_tokens=8) for _ in range(3)]
    for handoff in handoffs:
        handoff.open()
    refused = await pair[0].recorder.outcome(handoffs[2].transfer_id)
    assert isinstance(refused.error, Overloaded)
    for handoff in handoffs[:2]:
        handoff.expect()
        handoff.ready(range(8))
        handoff.finish()
        await assert_done(kv, handoff)


async def test_a_mismatched_fingerprint_shows_the_difference_on_both_sides(make_node: Any, kv: Any) -> None:
    other = replace(kv.FINGERPRINT, dtype="bfloat16", rope="other")
    pair = await make_node("prefill"), await make_node("decode", 24, other)
    handoff = kv.Handoff(*pair, num_tokens=40)
    handoff.start()
    pushed, received = await handoff.outcomes()
    for event in (pushed, received):
        assert isinstance(event.error, KVLayoutMismatch)
        assert "dtype: 'bfloat16' != 'float32'" in str(event.error)
        assert "rope" in str(event.error)
    assert pair[1].store.num_scatters == 0
    await assert_at_rest(kv, *pair)


async def test_another_prompt_is_refused(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=40)
    handoff.expect()
    handoff.open(BlockHash(b"q" * 32))
    handoff.ready(range(40))
    handoff.finish()
    pushed, received = await handoff.outcomes()
    for event in (pushed, received):
        assert isinstance(event.error, TransferCorrupt)
        assert "prompt digests differ" in str(event.error)
    assert pair[1].store.num_scatters == 0


async def test_a_prefill_that_finishes_short_fails_both_sides(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=40)
    handoff.expect()
    handoff.open()
    handoff.ready(range(39))
    handoff.finish()
    pushed, received = await handoff.outcomes()
    assert "before all of its KV was ready" in str(pushed.error)
    assert isinstance(received, ReceiveFailed)
    await assert_at_rest(kv, *pair)


@pytest.mark.parametrize("parts", [(range(0, 20), range(10, 40)), (range(0, 20), range(21, 40))])
async def test_overlapping_or_skipped_reports_fail_the_transfer(
    pair: Any, kv: Any, parts: tuple[range, ...]
) -> None:
    handoff = kv.Handoff(*pair, num_tokens=40)
    handoff.expect()
    handoff.open()
    for part in parts:
        handoff.ready(part)
    pushed, received = await handoff.outcomes()
    assert isinstance(pushed.error, TransferCorrupt)
    assert isinstance(received.error, TransferFailed)
    await assert_at_rest(kv, *pair)


async def test_a_transfer_id_is_never_served_twice(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=8)
    handoff.start()
    await assert_done(kv, handoff)
    again = kv.Handoff(*pair, num_tokens=8)
    again.transfer_id, first = handoff.transfer_id, again.transfer_id
    assert first != again.transfer_id
    pair[0].recorder.events.clear()
    again.open()
    pushed = await pair[0].recorder.outcome(again.transfer_id)
    assert "is over" in str(pushed.error)


async def test_opening_or_expecting_twice_is_refused(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=8)
    handoff.expect()
    handoff.open()
    with pytest.raises(DuplicateRequest):
        handoff.expect()
    with pytest.raises(DuplicateRequest):
        handoff.open()
    handoff.ready(range(8))
    handoff.finish()
    await assert_done(kv, handoff)


async def test_too_many_transfers_are_refused(make_node: Any, kv: Any) -> None:
    pair = (
        await make_node("prefill", max_concurrent_transfers=1),
        await make_node("decode", max_concurrent_transfers=1),
    )
    first, second = kv.Handoff(*pair, num_tokens=8), kv.Handoff(*pair, num_tokens=8)
    first.expect()
    first.open()
    with pytest.raises(Overloaded):
        second.expect()
    second.open()
    refused = await pair[0].recorder.outcome(second.transfer_id)
    assert isinstance(refused.error, Overloaded)
    first.ready(range(8))
    first.finish()
    await assert_done(kv, first)
    second = kv.Handoff(*pair, num_tokens=8)
    second.start()
    await assert_done(kv, second)


async def test_unknown_transfers_are_ignored(pair: Any, kv: Any) -> None:
    sender = pair[0].service
    unknown = TransferId(1, AttemptId(1))
    sender.push_ready(unknown, (), range(1), range(1))
    sender.finish_push(unknown, 1)
    await sender.cancel(unknown)
    handoff = kv.Handoff(*pair, num_tokens=8)
    handoff.start()
    await assert_done(kv, handoff)
    assert len(pair[0].recorder.events) == 1


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "host.invalid:7000", "[::1]:0"])
async def test_an_unreachable_receiver_fails_the_push(pair: Any, kv: Any, address: str) -> None:
    handoff = kv.Handoff(*pair, num_tokens=8)
    spec = kv.PushSpec(handoff.transfer_id, address, 8, kv.DIGEST)
    pair[0].service.open_push(spec)
    pushed = await pair[0].recorder.outcome(handoff.transfer_id)
    assert isinstance(pushed.error, TransferFailed)
    await assert_at_rest(kv, *pair)


async def test_a_host_name_is_resolved(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=40)
    handoff.expect()
    port = pair[1].service.address.rpartition(":")[2]
    pair[0].service.open_push(kv.PushSpec(handoff.transfer_id, f"localhost:{port}", 40, kv.DIGEST))
    handoff.ready(range(40))
    handoff.finish()
    await assert_done(kv, handoff)


async def test_one_link_serves_all_transfers_of_a_pair(pair: Any, kv: Any) -> None:
    for _ in range(3):
        handoff = kv.Handoff(*pair, num_tokens=8)
        handoff.start()
        await assert_done(kv, handoff)
    assert pair[0].service.snapshot().num_outgoing_links == 1
    assert pair[1].service.snapshot().num_incoming_links == 1


async def test_an_idle_link_closes_and_comes_back(make_node: Any, kv: Any) -> None:
    pair = await make_node("prefill", link_idle_s=0.02), await make_node("decode")
    for _ in range(2):
        handoff = kv.Handoff(*pair, num_tokens=40)
        handoff.start()
        await assert_done(kv, handoff)
        await kv.eventually(lambda: pair[0].service.snapshot().num_outgoing_links == 0, "still open")
        await kv.eventually(lambda: pair[1].service.snapshot().num_incoming_links == 0, "still open")


async def test_transports_that_differ_are_refused(make_node: Any, kv: Any, transport: str) -> None:
    other = "memory" if transport == "tcp" else "tcp"
    pair = await make_node("prefill"), await make_node("decode", transport=other)
    handoff = kv.Handoff(*pair, num_tokens=8)
    handoff.open()
    pushed = await pair[0].recorder.outcome(handoff.transfer_id)
    assert f"moves KV by {other}" in str(pushed.error)


async def test_the_receiver_scatters_nothing_outside_its_transfer(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=50)
    handoff.start()
    await assert_done(kv, handoff)
    cache = pair[1].store.cache.copy()
    blocks, within = pair[1].store.slots(handoff.received_blocks, range(50))
    cache[:, :, blocks, within] = 0
    assert not np.any(cache)
