"""For callers who want one call at most: what follows the first is left out."""

from __future__ import annotations

from kvrelay.openai_proxy.tool_calls.events import CallStarted, Text, ToolEvent, ToolParser


class OneCallParser:
    """See `kvrelay.openai_proxy.tool_calls.events.ToolParser`. Words before the call stay."""

    def __init__(self, inner: ToolParser) -> None:
        self._inner = inner
        self._has_call = False

    def push(self, text: str) -> list[ToolEvent]:
        return self._kept(self._inner.push(text))

    def finish(self) -> list[ToolEvent]:
        return self._kept(self._inner.finish())

    def _kept(self, events: list[ToolEvent]) -> list[ToolEvent]:
        kept: list[ToolEvent] = []
        for event in events:
            self._has_call = self._has_call or isinstance(event, CallStarted)
            is_wanted = not self._has_call if isinstance(event, Text) else event.index == 0
            if is_wanted:
                kept.append(event)
        return kept
