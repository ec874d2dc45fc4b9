"""TOML with line numbers: which line each key stands on, and every syntax error, not only the first.

The text is cut into statements (a table header, or a key with its value), each judged by `tomllib` on its
own: one that only lacks its end grows by the next line; one that is wrong is reported and blanked, and
the rest is read on. Pure: text in, values out.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from kvrelay.cli.faults import Fault

KeyPath = tuple[str, ...]

MAX_LINES: Final = 5000
MAX_STATEMENT_LINES: Final = 200
_MAX_REPAIRS: Final = 50
_AT_END: Final = "(at end of document)"
_POSITION: Final = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)$")
_HEADER: Final = re.compile(r"""\s*\[\[?[\w\s."'-]+\]\]?\s*(\#.*)?$""")
_KEY_OR_HEADER: Final = re.compile(_HEADER.pattern + r"""|\s*[\w."'-][\w\s."'-]*=""")
_HINTS: Final = {
    "Invalid value": 'strings need quotes ("…"), and numbers, true and false none',
    "Unterminated string": "close the string with the quotes that it began with",
    "Illegal character": "close the string with the quotes that it began with",
    "Expected '=' after a key": "write key = value",
    "Invalid statement": "write [section] or key = value",
}


@dataclass(frozen=True, slots=True)
class TomlSource:
    """What could be read. `lines` has the line (from 1) of every key and table header, by path."""

    document: dict[str, object]
    lines: Mapping[KeyPath, int]
    faults: tuple[Fault, ...] = ()

    def line_of(self, path: KeyPath) -> int | None:
        """Line of `path`, or of the nearest table around it."""
        while path:
            if path in self.lines:
                return self.lines[path]
            path = path[:-1]
        return None


@dataclass(slots=True)
class _Reader:
    lines: list[str]
    kept: list[str] = field(default_factory=list)
    positions: dict[KeyPath, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    prefix: KeyPath = ()

    def read(self) -> None:
        """Go through all statements once; fills the other fields."""
        self.kept = list(self.lines)
        index = 0
        while index < len(self.lines):
            index = self._read_statement(index)

    def _read_statement(self, start: int) -> int:
        """Read the statement that begins at `start`; returns where the next one does."""
        for end in range(start + 1, min(len(self.lines), start + MAX_STATEMENT_LINES) + 1):
            chunk = "\n".join(self.lines[start:end]) + "\n"
            try:
                parsed = tomllib.loads(chunk)
            except (tomllib.TOMLDecodeError, RecursionError) as error:
                if isinstance(error, RecursionError) or not str(error).endswith(_AT_END):
                    return self._skip(start, str(error))
            else:
                self._note_positions(parsed, start, _is_header(chunk))
                return end
        return self._skip(start, "this value is never closed")

    def _note_positions(self, parsed: dict[str, object], start: int, is_header: bool) -> None:
        prefix = () if is_header else self.prefix
        for path in _key_paths(parsed):
            self.positions.setdefault(prefix + path, start + 1)
            if is_header:
                self.prefix = path

    def _skip(self, start: int, error: str) -> int:
        """Report the statement at `start` and blank it; returns where the next one begins."""
        self.faults.append(_syntax_fault(self.lines[start], start + 1, error))
        if _is_header(self.lines[start]):
            return _blank_table(self.kept, start)
        resume = start + 1
        if _is_left_open(self.lines[start]):
            while resume < len(self.lines) and not _KEY_OR_HEADER.match(self.lines[resume]):
                resume += 1
        self.kept[start:resume] = [""] * (resume - start)
        return resume


def parse_toml(text: str) -> TomlSource:
    """Parse as much of `text` as can be understood. Never raises; see `TomlSource.faults`."""
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    if len(lines) > MAX_LINES:
        return TomlSource({}, {}, (Fault(f"has {len(lines)} lines, at most {MAX_LINES} are read"),))
    reader = _Reader(lines)
    reader.read()
    document = _parse_kept(reader)
    return TomlSource(document, reader.positions, tuple(reader.faults))


def _parse_kept(reader: _Reader) -> dict[str, object]:
    """The document without the statements at fault; what clashes (a key given twice) is blanked too."""
    for _ in range(_MAX_REPAIRS):
        try:
            return tomllib.loads("\n".join(reader.kept))
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            position = _POSITION.search(str(error))
            line = int(position[1]) if position and position[1] else None
            if line is None or not reader.kept[line - 1].strip():
                reader.faults.append(Fault(f"can't be read: {_POSITION.sub('', str(error))}", line=line))
                return {}
            statement = reader.kept[line - 1]
            reader.faults.append(_clash_fault(statement, line, str(error)))
            reader.kept[line - 1] = ""
            if _is_header(statement):
                _blank_table(reader.kept, line - 1)
    return {}


def _is_left_open(line: str) -> bool:
    """Whether what follows `line` may be the rest of its value."""
    opened = sum(map(line.count, "[{")) > sum(map(line.count, "]}"))
    return opened or any(line.count(quotes) % 2 == 1 for quotes in ('"""', "'''"))


def _is_header(statement: str) -> bool:
    return statement.lstrip().startswith("[")


def _blank_table(lines: list[str], start: int) -> int:
    """Blank the header at `start` and all up to the next one, lest its keys count as another table's."""
    end = start + 1
    while end < len(lines) and not _HEADER.match(lines[end]):
        end += 1
    lines[start:end] = [""] * (end - start)
    return end


def _syntax_fault(statement: str, line: int, error: str) -> Fault:
    message = _POSITION.sub("", error)
    position = _POSITION.search(error)
    if position and position[1] and position[1] != "1":
        message = f"{message} {int(position[1]) - 1} lines below"
    hint = next((hint for start, hint in _HINTS.items() if message.startswith(start)), "")
    shown = statement.strip()
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return Fault(f"is not TOML: {message}", key=f"`{shown}`", line=line, hint=hint)


def _clash_fault(statement: str, line: int, error: str) -> Fault:
    fault = _syntax_fault(statement, line, error)
    if error.startswith(("Cannot overwrite", "Cannot declare", "Cannot mutate")):
        return Fault("is given twice", key=fault.key, line=line, hint="keep one of them")
    return fault


def _key_paths(table: Mapping[str, object], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """Paths of all keys in `table`, outer ones first."""
    for name, value in table.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from _key_paths(value, (*prefix, name))
