"""An answer that is a call and nothing else: ``{"name": …, "parameters": …}``, several separated by ``;``.

Source: the JSON based tool calling format of the Llama 3.1 and 3.2 prompt format documentation.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from kvrelay.openai_proxy.tool_calls.call_scanner import CallScanner
from kvrelay.openai_proxy.tool_calls.events import CallArguments, CallStarted, Text, ToolEvent

TAG: Final = "<|python_tag|>"


class LlamaParser:
    """See `kvrelay.openai_proxy.tool_calls.events.ToolParser`. An object that names none of `tool_names` is
    text, since JSON may be what was asked for."""

    def __init__(self, tool_names: Collection[str]) -> None:
        self._tool_names = frozenset(tool_names)
        self._held = ""
        self._scanner: CallScanner | None = None
        self._num_calls = 0
        self._is_started = False
        self._is_text = False

    def push(self, text: str) -> list[ToolEvent]:
        if self._is_text:
            return [Text(text)] if text else []
        events: list[ToolEvent] = []
        self._held += text
        while self._held and not self._is_text and self._advance(events):
            pass
        return events

    def finish(self) -> list[ToolEvent]:
        held, self._held = self._held, ""
        scanner, self._scanner = self._scanner, None
        if scanner is not None and not self._is_started:
            held = scanner.raw + held
        if self._num_calls and not held.strip("; \t\r\n"):
            return []
        return [Text(held)] if held else []

    def _advance(self, events: list[ToolEvent]) -> bool:
        if self._scanner is not None:
            return self._read_call(self._scanner, events)
        rest = self._held.lstrip("; \t\r\n" if self._num_calls else " \t\r\n")
        if rest.startswith(TAG):
            self._held = rest.removeprefix(TAG)
        elif rest.startswith("{"):
            self._held, self._scanner, self._is_started = rest, CallScanner(), False
        elif rest and not TAG.startswith(rest):
            self._turn_to_text(events, "")
        else:
            return False
        return True

    def _read_call(self, scanner: CallScanner, events: list[ToolEvent]) -> bool:
        self._held = scanner.push(self._held)
        if not self._is_started and (scanner.is_over or scanner.name is not None):
            if scanner.name is None or scanner.name not in self._tool_names:
                self._scanner = None
                self._turn_to_text(events, scanner.raw)
                return False
            self._is_started = True
            events.append(CallStarted(self._num_calls, scanner.name))
        if self._is_started and (arguments := scanner.take_arguments()):
            events.append(CallArguments(self._num_calls, arguments))
        if not scanner.is_over:
            return False
        self._num_calls += 1
        self._scanner = None
        return True

    def _turn_to_text(self, events: list[ToolEvent], before: str) -> None:
        self._is_text = True
        text, self._held = before + self._held, ""
        if text:
            events.append(Text(text))
