"""A peer that says any frames in any order, and bytes that are none: it reads nothing that was not sent to
it, writes nothing that is not its own, and what honest peers do meanwhile goes well."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.core.errors import KVRelayError, TransferCorrupt
from kvrelay.kv_transfer.interface import ExpectedTransfer, PushDone, PushFailed, PushSpec, ReceiveFailed
from kvrelay.kv_transfer.messages import Chunk, Grant, Offer, SlotsGranted, Want
from tests.kv_transfer.hostile_stage import (
    BLOCK_SIZE,
    DIGEST,
    FINGERPRINT,
    FRAMES,
    HONEST_BLOCKS,
    NOISE,
    NUM_BLOCKS,
    NUM_SLOTS,
    NUM_TOKENS,
    OWN,
    OWN_BLOCKS,
    SLOT_BYTES,
    Peer,
    Stage,
    hello,
    hostile_staging,
    staging_of,
)

LONG_S = 12.0
"""Every time-out and quarantine is over."""
WRITES = st.tuples(
    st.integers(0, NUM_SLOTS + 1),
    st.sampled_from((0, 0, 0, 16)),
    st.sampled_from((1, 64, SLOT_BYTES, SLOT_BYTES + 1)),
)
SENDER_ACTS = st.lists(FRAMES | FRAMES | WRITES | NOISE | st.sampled_from((0.01, 0.2)), max_size=12)
RECEIVER_ACTS = st.lists(FRAMES | FRAMES | NOISE | st.sampled_from((0.01, 0.2)), max_size=12)


@settings(deadline=None, max_examples=80)
@given(acts=SENDER_ACTS, is_expected=st.booleans(), is_granted=st.booleans())
def test_a_hostile_sender_touches_nothing_but_its_own_transfer(
    acts: list[Any], is_expected: bool, is_granted: bool
) -> None:
    stage = Stage()
    stage.start_honest()
    if is_expected:
        stage.receiver.transfers.expect(ExpectedTransfer(OWN, OWN_BLOCKS, NUM_TOKENS, 0, DIGEST))
    peer = stage.dial()
    if is_granted:
        peer.say(hello())
        peer.say(Offer(OWN, NUM_TOKENS, DIGEST, FINGERPRINT.digest, 2))
        stage.pass_s(0.1)
        assert any(isinstance(frame, SlotsGranted) for frame in peer.heard) == is_expected
    for act in acts:
        if peer.is_lost:
            peer = stage.dial()
        if isinstance(act, tuple):
            write(stage, peer, *act)
        elif isinstance(act, float):
            stage.pass_s(act)
        else:
            peer.say(act)
        stage.go_on()
        stage.pass_s(0.02)
    stage.finish_honest()
    peer.end.close()
    stage.pass_s(LONG_S)
    stage.receiver.transfers.cancel(OWN, lambda: None)
    stage.pass_s(LONG_S)
    stage.assert_honest_arrived()
    stage.receiver.assert_at_rest()
    assert len(stage.receiver.outcomes(OWN)) <= 1
    nobodys = [block for block in range(NUM_BLOCKS) if block not in (*HONEST_BLOCKS, *OWN_BLOCKS)]
    assert not stage.receiver.blocks(tuple(nobodys)).any()
    own = stage.receiver.blocks(OWN_BLOCKS)
    assert (own < 128).all(), "it has the KV of another transfer"
    assert is_expected or not own.any()


def write(stage: Stage, peer: Peer, slot: int, within: int, num_bytes: int) -> None:
    """A write through the transport lands in what the peer was granted, or not at all."""
    owner, offset = stage.receiver.transfers.owner, slot * SLOT_BYTES + within
    has_landed = staging_of(stage.receiver)._accept(peer.ticket, offset, memoryview(b"x" * num_bytes))
    if has_landed:
        assert owner.holder_of(offset) == OWN
        assert not within
        assert num_bytes <= SLOT_BYTES


@settings(deadline=None, max_examples=80)
@given(
    acts=RECEIVER_ACTS,
    slot_bytes=st.sampled_from((0, 15, 16, 64, SLOT_BYTES, 1 << 34)),
    num_slots=st.sampled_from((0, 1, NUM_SLOTS, 4096)),
    knows_endpoint=st.booleans(),
    is_granting=st.booleans(),
)
def test_a_hostile_receiver_gets_what_is_pushed_to_it_and_nothing_else(
    acts: list[Any], slot_bytes: int, num_slots: int, knows_endpoint: bool, is_granting: bool
) -> None:
    stage = Stage()
    transport, staging = hostile_staging(lambda _, offset, length: offset + length <= staging.num_bytes)
    transport.admit(1)
    peers = stage.listen()
    stage.start_honest()
    mark_own(stage)
    stage.sender.transfers.open_push(PushSpec(OWN, "h:1", NUM_TOKENS, DIGEST))
    stage.sender.transfers.push_prefix(OWN, OWN_BLOCKS, NUM_TOKENS)
    stage.pass_s(0.1)
    endpoint = transport.endpoint() if knows_endpoint else b"nowhere"
    greeting = hello(endpoint=endpoint, ticket=b"\x01", slot_bytes=slot_bytes, num_slots=num_slots)
    peers[0].say(greeting)
    if is_granting:
        peers[0].say(Grant(OWN, 0))
    for act in acts:
        if isinstance(act, float):
            stage.pass_s(act)
        else:
            peers[-1].say(act)
        stage.go_on()
        stage.pass_s(0.02)
    stage.finish_honest()
    stage.pass_s(LONG_S)
    transport.close()
    stage.assert_honest_arrived()
    stage.sender.assert_at_rest()
    (outcome,) = stage.sender.outcomes(OWN)
    assert isinstance(outcome, PushDone | PushFailed)
    assert not isinstance(outcome, PushFailed) or isinstance(outcome.error, KVRelayError)
    assert set(bytes(staging.host_view())) <= {0, ord("o")}


def mark_own(stage: Stage) -> None:
    """What is pushed to the hostile peer: no other block of the sender has such bytes."""
    first, last = OWN_BLOCKS[0] * BLOCK_SIZE, (OWN_BLOCKS[-1] + 1) * BLOCK_SIZE
    stage.sender.cache[:, :, first:last] = ord("o")


def test_a_message_that_was_never_written_brings_nothing_of_what_its_slot_held_before() -> None:
    """Without a checksum it would pass, and the node would go on with another prompt's KV."""
    stage = Stage()
    stage.start_honest()
    stage.finish_honest()
    stage.receiver.transfers.expect(ExpectedTransfer(OWN, OWN_BLOCKS, NUM_TOKENS, 0, DIGEST))
    peer = stage.dial()
    peer.say(hello())
    peer.say(Offer(OWN, NUM_TOKENS, DIGEST, FINGERPRINT.digest, 2))
    stage.pass_s(0.1)
    (granted,) = [frame for frame in peer.heard if isinstance(frame, SlotsGranted)]
    peer.say(Chunk(OWN, 0, granted.slots[0], range(2), range(4), 128, False, 0))
    stage.pass_s(0.1)
    assert not stage.receiver.blocks(OWN_BLOCKS).any()
    (outcome,) = stage.receiver.outcomes(OWN)
    assert isinstance(outcome, ReceiveFailed)
    assert isinstance(outcome.error, TransferCorrupt)


def test_a_peer_that_keeps_to_the_protocol_succeeds_on_this_stage() -> None:
    """So that the tests above refuse what is hostile, and not everything."""
    stage = Stage()
    stage.start_honest()
    stage.receiver.transfers.expect(ExpectedTransfer(OWN, OWN_BLOCKS, NUM_TOKENS, 0, DIGEST))
    peer = stage.dial()
    peer.say(hello())
    peer.say(Offer(OWN, NUM_TOKENS, DIGEST, FINGERPRINT.digest, 0))
    peer.say(Want(OWN, 1))
    stage.pass_s(0.1)
    (granted,) = [frame for frame in peer.heard if isinstance(frame, SlotsGranted)]
    source = memoryview(b"x" * SLOT_BYTES)
    assert staging_of(stage.receiver)._accept(peer.ticket, granted.slots[0] * SLOT_BYTES, source)
    assert not staging_of(stage.receiver)._accept(
        peer.ticket, (granted.slots[0] + 1) % 4 * SLOT_BYTES, source
    )
    stage.finish_honest()
    stage.assert_honest_arrived()
    np.testing.assert_array_equal(stage.receiver.blocks(OWN_BLOCKS), 0)
