"""The receiving end of a data connection, and senders that do not keep to what was granted."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.core.errors import TransferFailed
from kvrelay.kv_transfer.tcp_streams import PREFACE_BYTES, IncomingStream

SLOT_BYTES = 64
NUM_SLOTS = 4
Ends = tuple[socket.socket, IncomingStream, bytearray, set[int]]


@contextmanager
def two_ends() -> Iterator[Ends]:
    """A sender's socket, the receiver's end, its staging, and the slots that are the sender's now."""
    sender, receiver = _tcp_pair()
    staging, granted = bytearray(SLOT_BYTES * NUM_SLOTS), {1}

    def may_write(offset: int, num_bytes: int) -> bool:
        slot, within = divmod(offset, SLOT_BYTES)
        return slot in granted and not within and 0 < num_bytes <= SLOT_BYTES

    stream = IncomingStream(receiver)
    sender.sendall(bytes(PREFACE_BYTES))
    while stream.receive_preface() is None:
        pass
    stream.begin(memoryview(staging), may_write)
    try:
        yield sender, stream, staging, granted
    finally:
        sender.close()
        receiver.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    with two_ends() as made:
        yield made


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = socket.create_connection(listener.getsockname())
        receiver, _ = listener.accept()
    return sender, receiver


def header(offset: int, num_bytes: int) -> bytes:
    return struct.pack(">QQQ", 7, offset, num_bytes)


def receive_until(stream: IncomingStream, staging: bytearray, offset: int, value: int) -> None:
    """What was sent over the loopback is there a moment later."""
    while staging[offset] != value:
        stream.receive()


def receive_on(stream: IncomingStream, staging: bytearray) -> None:
    """Until the connection ends; no ``x`` may land meanwhile."""
    while b"x" not in staging:
        stream.receive()


def test_a_message_lands_in_its_slot_and_is_answered(ends: Ends) -> None:
    sender, stream, staging, _ = ends
    sender.sendall(header(SLOT_BYTES, 8) + b"k" * 8)
    receive_until(stream, staging, SLOT_BYTES + 7, ord("k"))
    assert staging == bytes(SLOT_BYTES) + b"k" * 8 + bytes(SLOT_BYTES * 3 - 8)
    assert sender.recv(8) == struct.pack(">Q", 0)
    assert sender.recv(8) == struct.pack(">Q", 7)


def test_the_rest_of_a_message_never_lands_in_a_slot_that_another_one_has_by_now(ends: Ends) -> None:
    """A sender that gives its slot back, or has it taken in, in the midst of a message to it."""
    sender, stream, staging, granted = ends
    sender.sendall(header(SLOT_BYTES, 32) + b"k" * 16)
    receive_until(stream, staging, SLOT_BYTES + 15, ord("k"))
    granted.clear()
    sender.sendall(b"x" * 16)
    with pytest.raises(TransferFailed, match="not any more"):
        receive_on(stream, staging)
    assert b"x" not in staging


@settings(deadline=None, max_examples=60)
@given(
    offset=st.integers(0, 2**64 - 1) | st.integers(0, SLOT_BYTES * NUM_SLOTS),
    num_bytes=st.integers(0, 2**64 - 1) | st.integers(0, 2 * SLOT_BYTES),
)
def test_a_write_that_was_not_granted_ends_the_connection_and_lands_nowhere(
    offset: int, num_bytes: int
) -> None:
    if offset == SLOT_BYTES and 0 < num_bytes <= SLOT_BYTES:
        return
    with two_ends() as (sender, stream, staging, _):
        sender.sendall(header(offset, num_bytes) + b"x" * 16)
        with pytest.raises(TransferFailed, match="granted"):
            receive_on(stream, staging)
        assert b"x" not in staging
