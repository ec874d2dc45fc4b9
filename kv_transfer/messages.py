"""What two nodes say to each other over a link's control connection.

The prefill node dials; both say `Hello`; then, for each transfer (-> from sender to receiver)::

    -> Offer   <- Grant | Reject
    -> Want    <- SlotsGranted           as often as needed; an offer asks for its first slots itself
       the payload is written into a granted slot by the transport
    -> Chunk                             in order; says what the slot holds
    -> Finish  <- Ack

Either side may `Abort`; the sender answers or follows its own with `Released` once no write of that
transfer can happen any more, which is when the receiver reuses the slots. Frames are msgpack arrays
``[code, field, ...]``; `decode` accepts nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgpack  # type: ignore[import-untyped]

from kvrelay.core.errors import TransferCorrupt
from kvrelay.core.ids import TransferId
from kvrelay.core.kv import KVFingerprint
from kvrelay.kv_transfer.fields import (
    FieldError,
    FieldType,
    blob,
    boolean,
    fingerprint,
    integer,
    slots,
    span,
    text,
    transfer_id,
)

PROTOCOL_VERSION: Final = 3
MAX_FRAME_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame both ways. `ticket` and the slot geometry come from the receiver only."""

    version: int
    node_id: str
    incarnation: str
    fingerprint: KVFingerprint
    transport: str
    endpoint: bytes
    ticket: bytes
    slot_bytes: int
    num_slots: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The link can't be used; the connection closes after it."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Offer:
    """The sender asks to send this transfer; `prompt_digest` is over all its token ids.

    `num_slots` messages are ready already: once it is granted, so many slots are wanted.
    """

    transfer_id: TransferId
    num_tokens: int
    prompt_digest: bytes
    fingerprint_digest: bytes
    num_slots: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Send tokens ``[first_token, num_tokens)``."""

    transfer_id: TransferId
    first_token: int


@dataclass(frozen=True, slots=True)
class Want:
    """`num_slots` more messages are ready to be sent."""

    transfer_id: TransferId
    num_slots: int


@dataclass(frozen=True, slots=True)
class SlotsGranted:
    """The sender may write one message into each of these slots."""

    transfer_id: TransferId
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SlotsReturned:
    """Granted slots that the sender has no use for now."""

    transfer_id: TransferId
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """`slot` holds KV of `layers` x `tokens`; `checksum` is xxh3-64 of the bytes, 0 when not `checked`."""

    transfer_id: TransferId
    sequence_number: int
    slot: int
    layers: range
    tokens: range
    num_bytes: int
    checked: bool
    checksum: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Everything was sent, so many messages and bytes; the prefill drew `output_token_id`."""

    transfer_id: TransferId
    num_messages: int
    num_bytes: int
    output_token_id: int


@dataclass(frozen=True, slots=True)
class Ack:
    """Everything has come and was verified."""

    transfer_id: TransferId


@dataclass(frozen=True, slots=True)
class Abort:
    """The transfer is over, without success. Also the refusal of an offer."""

    transfer_id: TransferId
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Released:
    """No write of this aborted transfer can reach a slot any more."""

    transfer_id: TransferId


@dataclass(frozen=True, slots=True)
class Pump:
    """A write is under way that may need the receiver's transport to be polled."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Answer with `Pong`."""


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to `Ping`."""


Frame = (
    Hello
    | Refuse
    | Offer
    | Grant
    | Want
    | SlotsGranted
    | SlotsReturned
    | Chunk
    | Finish
    | Ack
    | Abort
    | Released
    | Pump
    | Ping
    | Pong
)

_ERROR_FIELDS: Final = (text(64), text(2048))
_FIELDS: Final[dict[type[Frame], tuple[FieldType, ...]]] = {
    Hello: (
        integer(0, 1 << 16),
        text(256),
        text(64),
        fingerprint(),
        text(32),
        blob(0, 32768),
        blob(0, 64),
        integer(0, 1 << 34),
        integer(0, 4096),
    ),
    Refuse: _ERROR_FIELDS,
    Offer: (transfer_id(), integer(1, 1 << 31), blob(32, 32), blob(16, 16), integer(0, 4096)),
    Grant: (transfer_id(), integer(0, 1 << 31)),
    Want: (transfer_id(), integer(1, 4096)),
    SlotsGranted: (transfer_id(), slots()),
    SlotsReturned: (transfer_id(), slots()),
    Chunk: (
        transfer_id(),
        integer(0, 1 << 40),
        integer(0, 4095),
        span(1 << 16),
        span(1 << 31),
        integer(1, 1 << 34),
        boolean(),
        integer(0, (1 << 64) - 1),
    ),
    Finish: (transfer_id(), integer(0, 1 << 40), integer(0, 1 << 50), integer(0, 1 << 31)),
    Ack: (transfer_id(),),
    Abort: (transfer_id(), *_ERROR_FIELDS),
    Released: (transfer_id(),),
    Pump: (),
    Ping: (),
    Pong: (),
}
_TYPE_OF_CODE: Final[tuple[type[Frame], ...]] = tuple(_FIELDS)
_CODE_OF_TYPE: Final = {frame_type: code for code, frame_type in enumerate(_TYPE_OF_CODE)}


def encode(frame: Frame) -> bytes:
    """One frame's msgpack bytes, without the length prefix."""
    frame_type = type(frame)
    names = frame_type.__dataclass_fields__
    fields = zip(_FIELDS[frame_type], names, strict=True)
    values = [field.to_wire(getattr(frame, name)) for field, name in fields]
    return bytes(msgpack.packb([_CODE_OF_TYPE[frame_type], *values]))


def decode(payload: bytes) -> Frame:
    """Rebuild a frame, checking every field.

    Raises:
        TransferCorrupt: the bytes are not exactly one well-formed frame.
    """
    frame_type, values = _unpack(payload)
    fields = _FIELDS[frame_type]
    if len(values) != len(fields):
        raise TransferCorrupt(f"malformed {frame_type.__name__}: {len(values)} fields, not {len(fields)}")
    checked: list[object] = []
    for field, name, value in zip(fields, frame_type.__dataclass_fields__, values, strict=True):
        try:
            checked.append(field.from_wire(value))
        except FieldError as error:
            raise TransferCorrupt(f"malformed {frame_type.__name__}.{name}: {error}") from None
    make = frame_type
    return make(*checked)  # type: ignore[arg-type]


def _unpack(payload: bytes) -> tuple[type[Frame], list[object]]:
    if len(payload) > MAX_FRAME_BYTES:
        raise TransferCorrupt(f"malformed frame: {len(payload)} bytes, at most {MAX_FRAME_BYTES}")
    try:
        unpacked: object = msgpack.unpackb(
            payload, max_array_len=4096, max_map_len=0, max_ext_len=0, strict_map_key=True
        )
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
        raise TransferCorrupt("malformed frame: not msgpack") from None
    if not isinstance(unpacked, list) or not unpacked:
        raise TransferCorrupt("malformed frame: not an array")
    code = unpacked[0]
    if type(code) is not int or not 0 <= code < len(_TYPE_OF_CODE):
        raise TransferCorrupt("malformed frame: unknown type")
    return _TYPE_OF_CODE[code], unpacked[1:]
