"""The rows of a trace file as they are read, and the error that names a bad one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from kvrelay.core.errors import ConfigError

MAX_TOKENS: Final = 10_000_000
"""Of one prompt or one answer: more is taken for a fault of the file."""


@dataclass(slots=True)
class TraceRows:
    """One entry of each list per request, in the file's order."""

    arrivals_s: list[float] = field(default_factory=list)
    num_prompt_tokens: list[int] = field(default_factory=list)
    num_output_tokens: list[int] = field(default_factory=list)
    blocks: list[Sequence[int]] = field(default_factory=list)

    def add(
        self, arrival_s: float, num_prompt_tokens: int, num_output_tokens: int, blocks: Sequence[int]
    ) -> None:
        self.arrivals_s.append(arrival_s)
        self.num_prompt_tokens.append(num_prompt_tokens)
        self.num_output_tokens.append(num_output_tokens)
        self.blocks.append(blocks)


def bad_line(name: str, line: int, field_name: str, text: str) -> ConfigError:
    """The error for one field of one line, counted from 1."""
    return ConfigError(f"trace {name}, line {line}, {field_name}: {text}", field="TRACE")


def checked_tokens(value: object, least: int, name: str, line: int, field_name: str) -> int:
    """A number of tokens.

    Raises:
        ConfigError: it is no integer from `least` to `MAX_TOKENS`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_TOKENS:
        text = f"must be an integer from {least} to {MAX_TOKENS}, got {value!r:.60}"
        raise bad_line(name, line, field_name, text)
    return value
