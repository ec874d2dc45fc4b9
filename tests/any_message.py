"""Any well-formed protobuf message: what a hostile peer may send, field by field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Final, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

AnyMessage = TypeVar("AnyMessage", bound=Message)
Draw = Callable[[Random], object]

EXTREMES: Final = (0, 0, 1, 1, 2, 3, 7, 64, 997, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS: Final = (0.0, 1e-310, 1e-9, 0.01, 1.0, 3600.0, 1e30, 1.7e308, -1.0, float("inf"), float("nan"))
TEXTS: Final = ("", "a", "sim", "memory", "OVERLOADED", "TRANSFER_FAILED", "\n", "\x00", "é" * 300, "a" * 64)

_BITS: Final = {
    FieldDescriptor.TYPE_UINT32: 32,
    FieldDescriptor.TYPE_UINT64: 64,
    FieldDescriptor.TYPE_FIXED32: 32,
    FieldDescriptor.TYPE_FIXED64: 64,
    FieldDescriptor.TYPE_INT32: 31,
    FieldDescriptor.TYPE_INT64: 63,
}
_MAX_REPEATED: Final = 4


def any_message(kind: type[AnyMessage], rng: Random, draws: Mapping[str, Draw] | None = None) -> AnyMessage:
    """A message of that type, each field set or not, to anything that its type allows, extremes above all.
    `draws` gives the values of fields by name, of the messages within it, too."""
    message = kind()
    _fill(message, rng, draws or {})
    return message


def _fill(message: Message, rng: Random, draws: Mapping[str, Draw]) -> None:
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.3:
            continue
        if field.is_repeated:
            _fill_repeated(message, field, rng, draws)
        elif field.message_type is not None:
            child = getattr(message, field.name)
            child.SetInParent()
            _fill(child, rng, draws)
        else:
            setattr(message, field.name, _scalar(field, rng, draws))


def _fill_repeated(message: Message, field: FieldDescriptor, rng: Random, draws: Mapping[str, Draw]) -> None:
    values = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return
    for _ in range(rng.randint(0, _MAX_REPEATED)):
        if field.message_type is not None:
            _fill(values.add(), rng, draws)
        else:
            values.append(_scalar(field, rng, draws))


def _scalar(field: FieldDescriptor, rng: Random, draws: Mapping[str, Draw]) -> object:
    if field.name in draws:
        return draws[field.name](rng)
    if field.type in _BITS:
        return rng.choice(EXTREMES) % (1 << _BITS[field.type])
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return rng.choice(FLOATS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type == FieldDescriptor.TYPE_ENUM:
        return rng.choice(field.enum_type.values).number
    text = rng.choice(TEXTS)
    return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
