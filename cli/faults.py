"""What is wrong with a configuration: all of it at once, each fault at its line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvrelay.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong. `line` counts from 1 and is None where no line of the file is at fault.

    `key` is dotted (``router.grpc_port``), `flag` the command-line flag that the value came from, if any.
    `hint` says what would be right.
    """

    message: str
    key: str = ""
    line: int | None = None
    hint: str = ""
    flag: str = ""

    def describe(self, file: str) -> str:
        """``FILE:LINE: key message; hint`` on one line, or ``FLAG: key message; hint``."""
        where = self.flag or (f"{file}:{self.line}" if self.line else file)
        what = f"{self.key} {self.message}" if self.key else self.message
        hint = f"; {self.hint}" if self.hint else ""
        return printable((f"{where}: " if where else "") + what + hint)


def printable(text: str) -> str:
    """`text` with control characters escaped: it may quote a file's bytes, and must stay on one line."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class FaultyConfigError(ConfigError):
    """A configuration that can't be used; `faults` are sorted by line."""

    def __init__(self, file: str, faults: Iterable[Fault]) -> None:
        self.file = file
        self.faults = tuple(sorted(faults, key=lambda fault: (fault.line or 0, fault.key)))
        super().__init__("\n".join(fault.describe(file) for fault in self.faults))
