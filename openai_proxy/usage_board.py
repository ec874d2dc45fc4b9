"""Counts that all workers of one proxy see: requests under way and tokens of the minute, by key.

One shared anonymous mapping of 64-bit integers, ``[worker, key, field]``. A worker writes its own rows only
and reads all, so there is no lock; a sum may be a moment old, never torn. A worker that died leaves its
counts to who takes its place, which starts from zero.
"""

from __future__ import annotations

import mmap
from typing import Final

_FIELDS: Final = 3
_RUNNING, _WINDOW, _TOKENS = range(_FIELDS)
_ITEM_BYTES: Final = 8


class UsageBoard:
    """`shared` None makes a new one for `num_workers`; this process writes the rows of `worker`."""

    def __init__(
        self, num_keys: int, num_workers: int = 1, worker: int = 0, shared: mmap.mmap | None = None
    ) -> None:
        assert 0 <= worker < num_workers
        self._num_keys = max(1, num_keys)
        self._num_workers = num_workers
        num_bytes = num_workers * self._num_keys * _FIELDS * _ITEM_BYTES
        self.shared = mmap.mmap(-1, num_bytes) if shared is None else shared
        self._cells = memoryview(self.shared).cast("q")
        self._base = worker * self._num_keys * _FIELDS
        row = self._num_keys * _FIELDS
        self._cells[self._base : self._base + row] = memoryview(bytes(row * _ITEM_BYTES)).cast("q")

    def enter(self, key: int) -> int:
        """Count a request that begins; returns how many of this key are under way now, it included."""
        self._cells[self._base + key * _FIELDS + _RUNNING] += 1
        return sum(self._cells[cell + _RUNNING] for cell in self._rows(key))

    def leave(self, key: int) -> None:
        """Count a request that has ended."""
        self._cells[self._base + key * _FIELDS + _RUNNING] -= 1

    def add_tokens(self, key: int, window: int, num_tokens: int) -> None:
        """Count tokens in a window of time; an earlier window's are forgotten."""
        cell = self._base + key * _FIELDS
        if self._cells[cell + _WINDOW] != window:
            self._cells[cell + _TOKENS] = 0
            self._cells[cell + _WINDOW] = window
        self._cells[cell + _TOKENS] += num_tokens

    def tokens(self, key: int, window: int) -> int:
        """All workers' tokens of that window."""
        return sum(
            self._cells[cell + _TOKENS] for cell in self._rows(key) if self._cells[cell + _WINDOW] == window
        )

    def _rows(self, key: int) -> range:
        row = self._num_keys * _FIELDS
        return range(key * _FIELDS, self._num_workers * row, row)
