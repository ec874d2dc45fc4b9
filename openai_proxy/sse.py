"""Server-sent events from values: JSON without blanks, text as it is."""

from __future__ import annotations

import json
from json.encoder import encode_basestring
from typing import Any, Final

DONE: Final = b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    """One event with a JSON value."""
    return b"data: " + compact_json(value) + b"\n\n"


def named_event(name: str, value: object) -> bytes:
    """One event that carries its name, as the Responses API has them."""
    return f"event: {name}\n".encode() + event(value)


def compact_json(value: object) -> bytes:
    """UTF-8. What UTF-8 can't hold is replaced."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


class TextEvent:
    """One shape of event of which only a text differs: the rest is encoded once.

    The hot path of a stream: a token costs one string's encoding.
    """

    _MARK: Final = "\ue000text\ue000"

    def __init__(self, shape: Any, name: str = "") -> None:
        """`shape` holds `TextEvent.MARK` where the text is to stand."""
        whole = named_event(name, shape) if name else event(shape)
        self._before, _, self._after = whole.partition(f'"{self._MARK}"'.encode())
        assert self._after, "the shape has no place for the text"

    MARK: Final = _MARK

    def with_text(self, text: str) -> bytes:
        """The event."""
        return self._before + encode_basestring(text).encode(errors="replace") + self._after
