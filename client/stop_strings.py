"""Finds stop strings in text as it comes, without ever giving out a part of one.

The match that ends first counts; of several that end at one place, the one that begins first. That does not
depend on how the text was cut into parts. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """One output's. `stops` must not be empty strings; matches that end within the first `min_tokens` tokens
    do not count. With `include_stop` the matched string is given out as the end of the text."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False, min_tokens: int = 0) -> None:
        self.matched: str | None = None
        self._stops = tuple(stops)
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._held = ""
        self._num_free_chars = 0
        """Of `_held`, from its beginning: a match must end behind them."""

    def push(self, text: str, num_tokens: int) -> str:
        """Take the text that settled with the output's token number `num_tokens` (from 1); returns what can
        be given out. Nothing may be pushed after a match."""
        assert self.matched is None
        if not self._held and self._first_chars.isdisjoint(text):
            return text
        self._held += text
        if num_tokens <= self._min_tokens:
            self._num_free_chars = len(self._held)
        elif self._match():
            text, self._held = self._held, ""
            return text
        return self._give_out(len(self._held) - self._num_undecided_chars())

    def flush(self) -> str:
        """The output is over: what was held back is no stop string."""
        return self._give_out(len(self._held))

    def _match(self) -> bool:
        """Whether `_held` holds a match; then it is cut to what may be given out."""
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := self._find(stop)) >= 0]
        if not found:
            return False
        end, start, self.matched = min(found)
        self._held = self._held[: end if self._include_stop else start]
        return True

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(0, self._num_free_chars - len(stop) + 1))

    def _num_undecided_chars(self) -> int:
        """The longest end of `_held` that some stop string begins with."""
        longest = max(map(len, self._stops)) - 1
        for size in range(min(len(self._held), longest), 0, -1):
            if self._held[-size] not in self._first_chars:
                continue
            end = self._held[-size:]
            if any(len(stop) > size and stop.startswith(end) for stop in self._stops):
                return size
        return 0

    def _give_out(self, num_chars: int) -> str:
        text, self._held = self._held[:num_chars], self._held[num_chars:]
        self._num_free_chars = max(0, self._num_free_chars - num_chars)
        return text
