"""What a tool parser makes of a model's text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """Words for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call of `name` begins; it is the answer's call number `index`."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of call `index`'s arguments, as JSON text."""

    index: int
    json_text: str


ToolEvent = Text | CallStarted | CallArguments


class ToolParser(Protocol):
    """Splits one answer into text and calls. What can't be told yet is held back until it can."""

    def push(self, text: str) -> list[ToolEvent]:
        """Take the next part of the text."""
        ...

    def finish(self) -> list[ToolEvent]:
        """The answer is over: what is still held turns out to be text."""
        ...
