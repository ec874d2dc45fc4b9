"""Cutting a byte stream into length-prefixed frames."""

from __future__ import annotations

from struct import Struct
from typing import Final

from kvrelay.core.errors import TransferCorrupt
from kvrelay.kv_transfer.messages import MAX_FRAME_BYTES, Frame, decode, encode

_LENGTH: Final = Struct(">I")


def frame_bytes(frame: Frame) -> bytes:
    """The frame as it goes over the wire: four bytes of length, big-endian, then msgpack."""
    payload = encode(frame)
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """Collects received bytes and gives back whole frames; holds at most one unfinished frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, received: bytes) -> list[Frame]:
        """Frames completed by these bytes, in order.

        Raises:
            TransferCorrupt: a frame is malformed or too long; the stream is unusable afterwards.
        """
        self._buffer += received
        frames = []
        position = 0
        while (end := self._end_of_frame(position)) is not None:
            frames.append(decode(bytes(self._buffer[position + _LENGTH.size : end])))
            position = end
        del self._buffer[:position]
        return frames

    def _end_of_frame(self, position: int) -> int | None:
        if len(self._buffer) - position < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer, position)
        if length > MAX_FRAME_BYTES:
            raise TransferCorrupt(f"malformed frame: {length} bytes announced, at most {MAX_FRAME_BYTES}")
        end = position + _LENGTH.size + int(length)
        return end if end <= len(self._buffer) else None
