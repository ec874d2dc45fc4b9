"""Rows of a prefill chunk for kernels that are planned for few lengths and one way of lying in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ChunkRows(NamedTuple):
    """``[num_rows, num_heads, head_dim]`` and twice ``[num_rows, num_kv_heads, head_dim]``."""

    queries: Tensor
    keys: Tensor
    values: Tensor

    def first(self, num_rows: int) -> ChunkRows:
        """Views of them."""
        return ChunkRows(self.queries[:num_rows], self.keys[:num_rows], self.values[:num_rows])


class ChunkPadding:
    """Gives chunks a length, and the strides of queries, keys and values that lie side by side in each row,
    as one matrix product for all three leaves them.

    One buffer of the longest length so far is used again and again, by work on one stream.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._heads = [num_heads, num_kv_heads, num_kv_heads]
        self._num_heads = sum(self._heads)
        self._head_dim = head_dim
        self._strides = (self._num_heads * head_dim, head_dim, 1)
        self._rows = torch.empty((0, self._num_heads, head_dim), dtype=dtype, device=device)
        self._num_written = 0

    def pad(self, chunk: ChunkRows, length: int) -> ChunkRows:
        """`chunk` itself, if it has the length and the strides; else a copy, with zeros behind its rows, that
        is good until the next one."""
        num_rows = chunk.queries.shape[0]
        has_strides = all(rows.stride() == self._strides for rows in chunk)
        if num_rows == length and has_strides:
            return chunk
        self._make_room(num_rows, length)
        if has_strides and self._is_side_by_side(chunk):
            self._rows[:num_rows].copy_(self._whole(chunk))
        else:
            for target, rows in zip(self.split(self._rows[:num_rows]), chunk, strict=True):
                target.copy_(rows)
        return self.split(self._rows[:length])

    def split(self, rows: Tensor) -> ChunkRows:
        """Views of ``[num_rows, num_heads + 2 * num_kv_heads, head_dim]``."""
        queries, keys, values = rows.split_with_sizes(self._heads, 1)
        return ChunkRows(queries, keys, values)

    def draw(self, length: int) -> ChunkRows:
        """Random rows with these strides."""
        shape = (length, self._num_heads, self._head_dim)
        return self.split(torch.randn(shape, dtype=self._rows.dtype, device=self._rows.device))

    def _make_room(self, num_rows: int, length: int) -> None:
        """Zeros from `num_rows` on: a row of an earlier chunk that is not finite would spoil this one."""
        if self._rows.shape[0] < length:
            self._rows = self._rows.new_zeros((length, self._num_heads, self._head_dim))
        elif num_rows < self._num_written:
            self._rows[num_rows : self._num_written].zero_()
        self._num_written = num_rows

    def _is_side_by_side(self, chunk: ChunkRows) -> bool:
        """Whether keys begin where a row's queries end, and values where its keys end."""
        start = chunk.queries.data_ptr()
        row_bytes = self._head_dim * chunk.queries.element_size()
        num_heads, num_kv_heads, _ = self._heads
        return (
            chunk.keys.data_ptr() == start + num_heads * row_bytes
            and chunk.values.data_ptr() == start + (num_heads + num_kv_heads) * row_bytes
        )

    def _whole(self, chunk: ChunkRows) -> Tensor:
        shape = (chunk.queries.shape[0], self._num_heads, self._head_dim)
        return chunk.queries.as_strided(shape, self._strides)
