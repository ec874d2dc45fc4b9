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
    """See `kvrelay.openai_proxy.tool_calls.events.ToolParser`. Blanks around calls are no words."""

    def __init__(self) -> None:
        self._held = ""
        self._blanks = ""
        """What is held of the text before `_held`: words may follow it, or a call."""
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
        rest = self._blanks
        if self._scanner is None:
            rest += "" if self._is_closing else self._held
        elif not self._is_started:
            rest += OPEN + self._scanner.raw
        self._held, self._blanks, self._scanner = "", "", None
        if self._num_calls and not rest.strip():
            return []
        return [Text(rest)] if rest else []

    def _advance(self, events: list[ToolEvent]) -> bool:
        """Take one step through what is held; False: more text has to come first."""
        if self._scanner is not None:
            return self._read_call(self._scanner, events)
        if self._is_closing:
            return self._read_close()
        return self._read_text(events)

    def _read_text(self, events: list[ToolEvent]) -> bool:
        settled, tag, after = self._held.partition(OPEN)
        if not tag:
            num_settled = len(settled) - overlap(settled, OPEN)
            settled, after = settled[:num_settled], settled[num_settled:]
        words = settled.rstrip()
        if words:
            events.append(Text(self._blanks + words))
            self._blanks = ""
        self._blanks += settled[len(words) :]
        self._held = after
        if tag:
            self._scanner, self._is_started = CallScanner(), False
        return bool(tag)

    def _read_call(self, scanner: CallScanner, events: list[ToolEvent]) -> bool:
        self._held = scanner.push(self._held)
        if not self._is_started and scanner.name is not None:
            self._is_started, self._blanks = True, ""
            events.append(CallStarted(self._num_calls, scanner.name))
        if self._is_started and (arguments := scanner.take_arguments()):
            events.append(CallArguments(self._num_calls, arguments))
        if not scanner.is_over:
            return False
        self._scanner = None
        if self._is_started:
            self._num_calls += 1
            self._is_closing = True
        else:  # The tag was words; a call may begin in what followed it.
            events.append(Text(self._blanks + OPEN))
            self._blanks, self._held = "", scanner.raw + self._held
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
