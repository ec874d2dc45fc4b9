"""Field types of control frames: how a value looks in msgpack, and what is accepted back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from kvrelay.core.ids import AttemptId, TransferId
from kvrelay.core.kv import KVFingerprint

_MAX_NAME_CHARS: Final = 1024
_MAX_U63: Final = (1 << 63) - 1


class FieldError(Exception):
    """A value that its field does not allow."""


@dataclass(frozen=True, slots=True)
class FieldType:
    """`to_wire` gives what msgpack packs; `from_wire` checks what msgpack unpacked, raising `FieldError`."""

    to_wire: Callable[[Any], object]
    from_wire: Callable[[object], object]


def _as_is(value: object) -> object:
    return value


def _integer(value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise FieldError(f"not an integer from {low} to {high}")
    return value


def _text(value: object, max_chars: int) -> str:
    if type(value) is not str or len(value) > max_chars:
        raise FieldError(f"not a text of at most {max_chars} characters")
    return value


def _array(value: object, length: int) -> list[object]:
    if type(value) is not list or len(value) != length:
        raise FieldError(f"not an array of {length}")
    return value


def integer(low: int, high: int) -> FieldType:
    """`low` and `high` are both allowed."""
    return FieldType(_as_is, lambda value: _integer(value, low, high))


def text(max_chars: int) -> FieldType:
    """Longer texts are cut when sent, and refused when received."""
    return FieldType(lambda value: value[:max_chars], lambda value: _text(value, max_chars))


def blob(min_bytes: int, max_bytes: int) -> FieldType:
    """Bytes within these lengths, both allowed."""

    def from_wire(value: object) -> bytes:
        if type(value) is not bytes or not min_bytes <= len(value) <= max_bytes:
            raise FieldError(f"not a blob of {min_bytes} to {max_bytes} bytes")
        return value

    return FieldType(_as_is, from_wire)


def boolean() -> FieldType:
    """True or False, and no number."""

    def from_wire(value: object) -> bool:
        if type(value) is not bool:
            raise FieldError("not a boolean")
        return value

    return FieldType(_as_is, from_wire)


def transfer_id() -> FieldType:
    """A `TransferId`, as two integers of 63 bits."""

    def to_wire(value: TransferId) -> object:
        return [value.router_epoch, value.attempt]

    def from_wire(value: object) -> TransferId:
        epoch, attempt = _array(value, 2)
        return TransferId(_integer(epoch, 0, _MAX_U63), AttemptId(_integer(attempt, 0, _MAX_U63)))

    return FieldType(to_wire, from_wire)


def span(max_stop: int) -> FieldType:
    """A non-empty `range` with step 1 within ``[0, max_stop]``."""

    def to_wire(value: range) -> object:
        return [value.start, value.stop]

    def from_wire(value: object) -> range:
        start, stop = _array(value, 2)
        found = range(_integer(start, 0, max_stop), _integer(stop, 0, max_stop))
        if not found:
            raise FieldError("an empty range")
        return found

    return FieldType(to_wire, from_wire)


def slots() -> FieldType:
    """One or more slot numbers, each once."""

    def from_wire(value: object) -> tuple[int, ...]:
        if type(value) is not list or not 1 <= len(value) <= 4096:
            raise FieldError("not an array of 1 to 4096 slots")
        found = tuple(_integer(slot, 0, 4095) for slot in value)
        if len(set(found)) != len(found):
            raise FieldError("a slot named twice")
        return found

    return FieldType(lambda value: list(value), from_wire)


def fingerprint() -> FieldType:
    """A `KVFingerprint`, as an array of its fields."""

    def to_wire(value: KVFingerprint) -> object:
        return [
            value.model,
            value.dtype,
            value.num_layers,
            value.num_kv_heads,
            value.head_dim,
            value.rope,
        ]

    def from_wire(value: object) -> KVFingerprint:
        model, dtype, num_layers, num_kv_heads, head_dim, rope = _array(value, 6)
        return KVFingerprint(
            model=_text(model, _MAX_NAME_CHARS),
            dtype=_text(dtype, 64),
            num_layers=_integer(num_layers, 1, 1 << 16),
            num_kv_heads=_integer(num_kv_heads, 1, 1 << 20),
            head_dim=_integer(head_dim, 1, 1 << 20),
            rope=_text(rope, _MAX_NAME_CHARS),
        )

    return FieldType(to_wire, from_wire)
