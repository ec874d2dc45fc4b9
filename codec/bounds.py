"""What a decoded field may hold. Each function raises `InvalidRequest` naming the field otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from kvrelay.core.errors import InvalidRequest

MAX_TOKEN_ID: Final = 2**31 - 1
MAX_INT32: Final = 2**31 - 1
MAX_CACHE_SALT_BYTES: Final = 256
MAX_MESSAGE_BYTES: Final = 1024
"""Error texts are cut to this: percent-encoded, and once more in the details, they fit gRPC's 8 KiB of
trailing metadata."""


def text(value: str, field: str, max_chars: int, *, is_required: bool = False) -> str:
    """Printable, at most `max_chars` long."""
    if is_required and not value:
        raise InvalidRequest(f"{field} must not be empty", field=field)
    if len(value) > max_chars:
        raise InvalidRequest(f"{field} has {len(value)} characters, at most {max_chars}", field=field)
    if not value.isprintable():
        raise InvalidRequest(f"{field} must hold printable characters only", field=field)
    return value


def whole(value: int, field: str, low: int, high: int = MAX_INT32) -> int:
    """An integer from `low` to `high`."""
    if not low <= value <= high:
        raise InvalidRequest(f"{field} must be from {low} to {high}, got {value}", field=field)
    return value


def length(number: int, field: str, most: int) -> None:
    """A repeated field's or byte string's length."""
    if number > most:
        raise InvalidRequest(f"{field} has a length of {number}, at most {most}", field=field)


def seconds(value: float, field: str, *, is_positive: bool = False) -> float:
    """Finite and not negative; with `is_positive` above 0."""
    if not math.isfinite(value) or value < 0 or (is_positive and value == 0):
        wanted = "above 0" if is_positive else "of at least 0"
        raise InvalidRequest(f"{field} must be a number of seconds {wanted}, got {value:g}", field=field)
    return value


def finite(value: float, field: str) -> float:
    """Neither infinite nor NaN."""
    if not math.isfinite(value):
        raise InvalidRequest(f"{field} must be a finite number, got {value:g}", field=field)
    return value


def token_ids(values: Sequence[int], field: str) -> tuple[int, ...]:
    """A repeated field of token ids, each below 2**31."""
    ids = tuple(values[:])
    if ids and max(ids) > MAX_TOKEN_ID:
        raise InvalidRequest(f"{field} holds {max(ids)}, at most {MAX_TOKEN_ID}", field=field)
    return ids


def cut(message: str, max_bytes: int = MAX_MESSAGE_BYTES) -> str:
    """A text that fits on the wire; never ends within a character."""
    raw = message.encode(errors="replace")
    if len(raw) <= max_bytes:
        return raw.decode()
    return raw[: max_bytes - 3].decode(errors="ignore") + "…"
