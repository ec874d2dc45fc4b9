"""Reads one call, a JSON object with a name and arguments, as it grows."""

from __future__ import annotations

import json
from typing import Final

_NAME_KEYS: Final = ("name",)
_ARGUMENT_KEYS: Final = ("arguments", "parameters")
_SPACE: Final = " \t\r\n"


class CallScanner:
    """Feed it text until it `is_over`: at the object's end, or where it proves to be none (`is_broken`).

    `raw` is all that it took. `name` is known once it was read; `take_arguments` hands out what came of the
    arguments since, and nothing before the name is known. A call's arguments are an object; some models
    write them as a string that holds one, which is unpacked.
    """

    def __init__(self) -> None:
        self.raw = ""
        self.name: str | None = None
        self.is_over = False
        self.is_broken = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._token_start = 0
        self._key: str | None = None
        self._expects_value = False
        self._value_start: int | None = None
        self._arguments = ""
        self._num_taken_chars = 0

    def push(self, text: str) -> str:
        """Take text up to the object's end; returns what lies behind it."""
        for position, char in enumerate(text):
            if self.is_over:
                return text[position:]
            self.raw += char
            self._step(char)
        return ""

    @property
    def is_call(self) -> bool:
        """Whether a whole call was read."""
        return self.is_over and not self.is_broken and self.name is not None

    def take_arguments(self) -> str:
        """What can be told of the arguments since the last time."""
        if self.name is None:
            return ""
        value = self._arguments
        if self._value_start is not None and self.raw[self._value_start] != '"':
            value = self.raw[self._value_start :]
        taken, self._num_taken_chars = value[self._num_taken_chars :], max(self._num_taken_chars, len(value))
        return taken

    def _step(self, char: str) -> None:
        if self._in_string:
            self._step_in_string(char)
        elif char == '"':
            self._in_string, self._token_start = True, len(self.raw) - 1
            self._note_value_start()
        elif char in "{[":
            self._open()
        elif char in "}]":
            self._close(char)
        elif self._depth == 0 and char not in _SPACE:
            self._break()
        elif self._depth == 1:
            self._step_between(char)

    def _step_in_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = False
            if self._depth == 1:
                self._end_string(self.raw[self._token_start :])

    def _end_string(self, quoted: str) -> None:
        try:
            text = json.loads(quoted, strict=False)
        except ValueError:
            self._break()
            return
        if not self._expects_value:
            self._key = text
        elif self._key in _NAME_KEYS:
            self.name = text
        elif self._key in _ARGUMENT_KEYS:
            self._arguments, self._value_start = text, None

    def _open(self) -> None:
        self._note_value_start()
        if self._depth == 0 and self.raw.strip() != "{":
            self._break()
        self._depth += 1

    def _close(self, char: str) -> None:
        self._depth -= 1
        if self._depth == 1:
            self._end_value()
        elif self._depth <= 0:
            self._end_value(without_last=True)
            self.is_over = True
            self.is_broken = self.is_broken or char != "}" or self._depth < 0

    def _step_between(self, char: str) -> None:
        if char == ":":
            self._expects_value = True
        elif char == ",":
            self._end_value(without_last=True)
            self._key, self._expects_value = None, False
        elif char not in _SPACE:
            self._note_value_start()

    def _note_value_start(self) -> None:
        """Arguments begin here, if it is their turn."""
        if (
            self._depth == 1
            and self._expects_value
            and self._key in _ARGUMENT_KEYS
            and self._value_start is None
            and not self._arguments
        ):
            self._value_start = len(self.raw) - 1

    def _end_value(self, *, without_last: bool = False) -> None:
        """The value that began at `_value_start`, if one did, ends with the last character or before it."""
        if self._value_start is not None:
            value = self.raw[self._value_start : -1] if without_last else self.raw[self._value_start :]
            self._arguments, self._value_start = value.rstrip(), None

    def _break(self) -> None:
        self.is_over = self.is_broken = True
