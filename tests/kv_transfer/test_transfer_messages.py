"""Control frames: every one survives the wire, and nothing else is accepted."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.core.errors import TransferCorrupt
from kvrelay.core.ids import AttemptId, TransferId
from kvrelay.core.kv import KVFingerprint
from kvrelay.kv_transfer import messages
from kvrelay.kv_transfer.frame_reader import FrameReader, frame_bytes
from kvrelay.kv_transfer.messages import (
    Abort,
    Ack,
    Chunk,
    Finish,
    Grant,
    Hello,
    Offer,
    Ping,
    Pong,
    Pump,
    Refuse,
    Released,
    SlotsGranted,
    SlotsReturned,
    Want,
    decode,
    encode,
)

ID = TransferId(2**63 - 1, AttemptId(3))
FRAMES = [
    Hello(1, "node", "ab", KVFingerprint("m", "float32", 2, 3, 4, "r"), "tcp", b"e", b"t", 4096, 8),
    Refuse("TRANSFER_FAILED", "no"),
    Offer(ID, 5, b"d" * 32, b"f" * 16, 4),
    Grant(ID, 3),
    Want(ID, 2),
    SlotsGranted(ID, (1, 0)),
    SlotsReturned(ID, (7,)),
    Chunk(ID, 0, 1, range(0, 4), range(8, 16), 512, True, 2**64 - 1),
    Finish(ID, 1, 512, 9),
    Ack(ID),
    Abort(ID, "TRANSFER_CORRUPT", "bad"),
    Released(ID),
    Pump(),
    Ping(),
    Pong(),
]
json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


def test_every_frame_type_is_tried() -> None:
    assert {type(frame) for frame in FRAMES} == set(messages._FIELDS)


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_a_frame_survives_the_wire(frame: Any) -> None:
    assert decode(encode(frame)) == frame


@given(st.integers(1, 40))
def test_frames_are_found_however_the_stream_is_cut(num_bytes: int) -> None:
    stream = b"".join(frame_bytes(frame) for frame in FRAMES)
    reader = FrameReader()
    pieces = [stream[start : start + num_bytes] for start in range(0, len(stream), num_bytes)]
    assert [frame for piece in pieces for frame in reader.feed(piece)] == FRAMES


@given(st.binary(max_size=200))
def test_random_bytes_raise_the_named_error_or_decode(payload: bytes) -> None:
    try:
        frame = decode(payload)
    except TransferCorrupt:
        return
    assert decode(encode(frame)) == frame


@given(st.integers(-2, 20), st.lists(json_like, max_size=10))
def test_random_fields_raise_the_named_error_or_decode(code: int, fields: list[Any]) -> None:
    try:
        frame = decode(msgpack.packb([code, *fields]))
    except TransferCorrupt:
        return
    assert decode(encode(frame)) == frame


@given(st.sampled_from(FRAMES), st.data())
def test_one_wrong_field_names_the_frame(frame: Any, data: st.DataObject) -> None:
    wire = msgpack.unpackb(encode(frame))
    if len(wire) == 1:
        return
    index = data.draw(st.integers(1, len(wire) - 1))
    wire[index] = data.draw(st.none() | st.just({}) | st.just(-1) | st.just([]) | st.just(1.5))
    with pytest.raises(TransferCorrupt, match=type(frame).__name__):
        decode(msgpack.packb(wire))


def test_a_frame_announced_too_long_is_refused_before_it_comes() -> None:
    with pytest.raises(TransferCorrupt, match="announced"):
        FrameReader().feed((messages.MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
