"""Whoever takes a prefix from another node's cache takes what is there, and may change its mind."""

from __future__ import annotations

from typing import Any

import pytest

from kvrelay.core.block_hash import DigestedTokens, root_hash, sequence_digest
from kvrelay.core.errors import TransferCorrupt, TransferFailed
from kvrelay.kv_transfer.interface import (
    ExpectedTransfer,
    PushDone,
    PushFailed,
    PushSpec,
    ReceiveDone,
    ReceiveFailed,
)

ROOT = root_hash(b"salt", b"fingerprint")
TOKENS = DigestedTokens(tuple(range(200)), ROOT)


def expect_up_to(handoff: Any, num_tokens: int) -> None:
    expected = ExpectedTransfer(
        handoff.transfer_id,
        handoff.receiver.take_blocks(num_tokens),
        num_tokens,
        handoff.first_token,
        TOKENS.digest(num_tokens),
        or_fewer=TOKENS,
    )
    handoff.received_blocks = expected.block_table
    handoff.receiver.service.expect(expected)


@pytest.mark.parametrize("num_tokens", [65, 96, 100])
async def test_the_first_tokens_arrive_when_the_sender_has_no_more(
    pair: Any, kv: Any, num_tokens: int
) -> None:
    handoff = kv.Handoff(*pair, num_tokens=num_tokens, first_token=64)
    expect_up_to(handoff, 100)
    handoff.open(TOKENS.digest(num_tokens))
    handoff.ready(range(num_tokens))
    handoff.finish(0)
    pushed, received = await handoff.outcomes()
    assert isinstance(pushed, PushDone), pushed
    assert isinstance(received, ReceiveDone), received
    assert received.num_tokens == num_tokens
    assert received.stats.num_bytes == (num_tokens - 64) * 512
    handoff.assert_equal()


async def test_a_sender_that_has_no_more_than_the_receiver_is_told_so(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=64, first_token=64)
    expect_up_to(handoff, 100)
    handoff.open(TOKENS.digest(64))
    handoff.ready(range(64))
    pushed, received = await handoff.outcomes()
    assert isinstance(received, ReceiveFailed)
    assert "64 are here already" in received.error.message
    assert isinstance(pushed, PushFailed)
    await kv.eventually(lambda: all(kv.at_rest(node) for node in pair), "slots leaked")


@pytest.mark.parametrize(
    ("num_tokens", "digest"),
    [(120, TOKENS.digest(120)), (80, sequence_digest(range(1, 81), ROOT)), (100, TOKENS.digest(80))],
    ids=["more tokens", "other tokens", "another digest"],
)
async def test_only_a_beginning_of_the_same_tokens_is_taken(
    pair: Any, kv: Any, num_tokens: int, digest: Any
) -> None:
    handoff = kv.Handoff(*pair, num_tokens=num_tokens)
    expect_up_to(handoff, 100)
    handoff.open(digest)
    pushed, received = await handoff.outcomes()
    assert isinstance(received.error, TransferCorrupt), received
    assert isinstance(pushed, PushFailed), pushed


async def test_a_handoff_takes_no_fewer_tokens(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=100)
    handoff.expect()
    address = pair[1].service.address
    pair[0].service.open_push(PushSpec(handoff.transfer_id, address, 99, kv.DIGEST))
    _, received = await handoff.outcomes()
    assert isinstance(received.error, TransferCorrupt), received


@pytest.mark.parametrize("is_offered", [False, True], ids=["before the offer", "after the offer"])
async def test_the_sender_of_a_refused_transfer_is_told(pair: Any, kv: Any, is_offered: bool) -> None:
    handoff = kv.Handoff(*pair, num_tokens=40)
    service = pair[1].service
    if is_offered:
        handoff.open()
        await kv.eventually(lambda: service.snapshot().num_pending_offers == 1, "no offer came")
        service.refuse(handoff.transfer_id)
    else:
        service.refuse(handoff.transfer_id)
        handoff.open()
    failed = await pair[0].recorder.outcome(handoff.transfer_id)
    assert isinstance(failed, PushFailed)
    assert isinstance(failed.error, TransferFailed)
    assert "gave up" in failed.error.message
    await kv.eventually(lambda: all(kv.at_rest(node) for node in pair), "something was left")
