"""The rows of one session's messages: stream ids and counts that come again go by a number.

In steady decode each decode node's tokens are for the same streams step after step; with several nodes the
rows of one take turns with those of others. So a few of them are remembered on both sides of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvrelay.core.errors import InvalidRequest

MAX_ROW_SETS: Final = 16

Rows = tuple[Sequence[int], Sequence[int]]
"""Stream ids and counts."""


class SentRows:
    """The sender's side. Rows are told apart by identity: lists that were sent must not change."""

    def __init__(self) -> None:
        self._by_number: dict[int, Rows] = {}
        self._num_sets_ever = 0

    def find(self, stream_ids: Sequence[int], counts: Sequence[int]) -> int:
        """The number under which the receiver has these rows; 0 if it has not."""
        for number, (known_ids, known_counts) in self._by_number.items():
            if known_ids is stream_ids and known_counts is counts:
                return number
        return 0

    def add(self, stream_ids: Sequence[int], counts: Sequence[int]) -> int:
        """Give rows that are about to be sent a number: a free one, or that of the oldest."""
        number = self._num_sets_ever % MAX_ROW_SETS + 1
        self._num_sets_ever += 1
        self._by_number[number] = stream_ids, counts
        return number


class ReceivedRows:
    """The receiver's side."""

    def __init__(self) -> None:
        self._by_number: dict[int, Rows] = {}

    def put(self, number: int, stream_ids: Sequence[int], counts: Sequence[int]) -> None:
        """Remember rows.

        Raises:
            InvalidRequest: the number is out of range.
        """
        if number > MAX_ROW_SETS:
            raise InvalidRequest(f"row_set is {number}, at most {MAX_ROW_SETS}", field="row_set")
        self._by_number[number] = stream_ids, counts

    def get(self, number: int) -> Rows:
        """The rows of that number.

        Raises:
            InvalidRequest: no rows came under it.
        """
        rows = self._by_number.get(number)
        if rows is None:
            raise InvalidRequest(f"row_set {number} names no rows of this session", field="row_set")
        return rows
