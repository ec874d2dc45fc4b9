"""``<tool_call>{"name": …, "arguments": …}</tool_call>``, any number of them, between words.

Source: the function calling format of the Hermes 2 Pro and Qwen 2.5 model cards.
"""

from __future__ import annotations

from typing import Final

from kvrelay.openai_proxy.tool_calls.call_scanner import CallScanner
from kvrelay.openai_proxy.tool_calls.events import CallArguments, CallStarted, Text, ToolEvent

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"


class HermesParser:
    """See `kvrelay.openai_proxy.tool_calls.events.ToolParser`."""

    def __init__(self) -> None:
        self._held = ""
        self._scanner: CallScanner | None = None
        self._is_closing = False
        self._num_calls = 0
        self._is_started = False

    def push(self, text: str) -> list[ToolEvent]:
        events: list[ToolEvent] = []
        self._held += text
        while self._held and self._advance(events):
            pass
        return events

    def finish(self) -> list[ToolEvent]:
        held, self._held = self._held, ""
        scanner, self._scanner = self._scanner, None
        if scanner is not None and not self._is_started:
            held = OPEN + scanner.raw + held
        if self._is_closing and not held.strip():
            held = ""
        return [Text(held)] if held else []

    def _advance(self, events: list[ToolEvent]) -> bool:
        """Take one step through what is held; False: more text has to come first."""
        if self._scanner is not None:
            return self._read_call(self._scanner, events)
        if self._is_closing:
            return self._read_close()
        return self._read_text(events)

    def _read_text(self, events: list[ToolEvent]) -> bool:
        before, tag, after = self._held.partition(OPEN)
        if tag:
            self._held, self._scanner, self._is_started = after, CallScanner(), False
            _add_text(events, before.rstrip() if self._num_calls or not before.strip() else before)
            return True
        num_held = overlap(self._held, OPEN)
        settled = self._held[: len(self._held) - num_held]
        if self._num_calls and not settled.strip():  # Blanks between calls are no words.
            return False
        self._held = self._held[len(settled) :]
        _add_text(events, settled)
        return False

    def _read_call(self, scanner: CallScanner, events: list[ToolEvent]) -> bool:
        self._held = scanner.push(self._held)
        if scanner.is_broken and not self._is_started:
            self._scanner = None
            _add_text(events, OPEN + scanner.raw)
            return True
        if scanner.name is not None and not self._is_started:
            self._is_started = True
            events.append(CallStarted(self._num_calls, scanner.name))
        if arguments := scanner.take_arguments():
            events.append(CallArguments(self._num_calls, arguments))
        if not scanner.is_over:
            return False
        if self._is_started:
            self._num_calls += 1
            self._is_closing = True
        else:
            _add_text(events, OPEN + scanner.raw)
        self._scanner = None
        return True

    def _read_close(self) -> bool:
        trimmed = self._held.lstrip()
        if trimmed.startswith(CLOSE):
            self._held, self._is_closing = trimmed.removeprefix(CLOSE), False
            return True
        if CLOSE.startswith(trimmed):
            return False
        self._is_closing = False  # The model forgot it.
        return True


def overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    return next(
        (size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0
    )


def _add_text(events: list[ToolEvent], text: str) -> None:
    if text:
        events.append(Text(text))
