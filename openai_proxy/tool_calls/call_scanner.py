"""Reads one call, a JSON object with a name and arguments, as it grows."""

from __future__ import annotations

import json
from typing import Final

_NAME_KEYS: Final = ("name",)
_ARGUMENT_KEYS: Final = ("arguments", "parameters")
_SPACE: Final = " \t\r\n"


class CallScanner:
    """Feed it text until it `is_over`: at the object's end, or where it proves to be none (`is_broken`).

    `name` is known once it was read; `take_arguments` hands out what came of the arguments since, and
    nothing before the name is known. A call's arguments are an object; some models write them as a string
    that holds one, which is unpacked. Of two names or arguments the first counts. The work is in proportion
    to the text.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_over = False
        self.is_broken = False
        self._taken: list[str] = []
        self._depth = 0
        self._string: list[str] | None = None
        """The string that is being read, with its quotes."""
        self._is_escaped = False
        self._key: str | None = None
        self._expects_value = False
        self._arguments: list[str] = []
        """Not handed out yet."""
        self._has_arguments = False
        self._reads_arguments = False
        self._reads_quoted_arguments = False

    @property
    def raw(self) -> str:
        """All that it took."""
        return "".join(self._taken)

    def push(self, text: str) -> str:
        """Take text up to the object's end; returns what lies behind it."""
        assert not self.is_over
        for position, char in enumerate(text, 1):
            self._step(char)
            if self.is_over:
                self._taken.append(text[:position])
                return text[position:]
        self._taken.append(text)
        return ""

    def take_arguments(self) -> str:
        """What can be told of the arguments since the last time."""
        if self.name is None:
            return ""
        text, held = "".join(self._arguments), ""
        if self._reads_arguments:  # Blanks at a value's end are none of it.
            text, held = text.rstrip(), text[len(text.rstrip()) :]
        self._arguments = [held]
        return text

    def _step(self, char: str) -> None:
        if self._depth == 0:
            self._step_before(char)
            return
        if self._string is None and self._depth == 1:
            self._step_between(char)
        if self._reads_arguments:
            self._arguments.append(char)
        if self._string is not None:
            self._step_in_string(self._string, char)
        elif char == '"':
            self._string = [char]
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._close(char)

    def _step_before(self, char: str) -> None:
        if char == "{":
            self._depth = 1
        elif char not in _SPACE:
            self._break()

    def _step_between(self, char: str) -> None:
        """Follow keys and values of the object itself."""
        if char == ":":
            self._expects_value = True
        elif char in ",}]":
            self._end_arguments()
            self._key, self._expects_value = None, False
        elif char not in _SPACE and self._expects_value and self._key in _ARGUMENT_KEYS:
            self._begin_arguments(char)

    def _begin_arguments(self, char: str) -> None:
        if not self._has_arguments:
            self._has_arguments = True
            self._reads_quoted_arguments = char == '"'
            self._reads_arguments = char != '"'

    def _end_arguments(self) -> None:
        if self._reads_arguments:
            self._arguments = ["".join(self._arguments).rstrip()]
            self._reads_arguments = False

    def _step_in_string(self, string: list[str], char: str) -> None:
        string.append(char)
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._string = None
            if self._depth == 1:
                self._end_string("".join(string))

    def _end_string(self, quoted: str) -> None:
        try:
            text = json.loads(quoted, strict=False)
        except ValueError:
            self._break()
            return
        if not self._expects_value:
            self._key = text
        elif self._key in _NAME_KEYS and self.name is None:
            self.name = text
        elif self._reads_quoted_arguments:
            self._arguments, self._reads_quoted_arguments = [text], False

    def _close(self, char: str) -> None:
        self._depth -= 1
        if self._depth == 1:
            self._end_arguments()
        elif self._depth == 0:
            self.is_over, self.is_broken = True, char != "}"

    def _break(self) -> None:
        self.is_over = self.is_broken = True
