"""Attention on the CPU over kernels of our own for single tokens, over torch's for chunks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kvrelay.engine.attention import Attention, Span
from kvrelay.engine.compiled.attention_kernel import attention_kernel
from kvrelay.engine.compiled.dtypes import kernel_dtype, row_stride
from kvrelay.engine.compiled.kernel import Kernel
from kvrelay.engine.compiled.openmp import OpenMP
from kvrelay.engine.compiled.row_kernels import write_kernel

_SCORES_STEP: Final = 256
"""Scratch for scores grows by at least this many keys."""


class CompiledAttention:
    """`cache` is ``[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]``; `chunks` attends for
    spans of several tokens."""

    def __init__(self, openmp: OpenMP, cache: Tensor, num_heads: int, chunks: Attention) -> None:
        num_layers, _, _, self._block_size, self._num_kv_heads, self._head_dim = cache.shape
        self._num_heads = num_heads
        self._chunks = chunks
        self._slots = [
            (cache[layer, 0].data_ptr(), cache[layer, 1].data_ptr()) for layer in range(num_layers)
        ]
        self._keeps_memory_alive = cache
        dtype, name = kernel_dtype(cache.dtype)
        variant = f"{name}-{self._head_dim}"
        self._attend = Kernel(openmp, attention_kernel(dtype, self._head_dim), variant)
        self._write = Kernel(openmp, write_kernel(dtype), name)
        self._write_slots = torch.empty(0, dtype=torch.int64)
        self._tables = np.empty((0, 0), dtype=np.int64)
        self._ends = np.empty(0, dtype=np.int64)
        self._num_keys = 0
        self._has_chunks = False
        self._scores = torch.empty((0, num_heads, 0))
        self._sums = torch.empty((0, 2, num_heads, self._head_dim))

    def prepare_thread(self, max_step_tokens: int, max_model_len: int) -> None:
        return

    def begin(self, spans: Sequence[Span], slots: Tensor) -> None:
        singles = list(takewhile(lambda span: span.num_tokens == 1, spans))
        self._write_slots = slots
        self._ends = np.array([span.end for span in singles], dtype=np.int64)
        self._num_keys = int(self._ends.sum())
        self._tables = self._block_tables(singles)
        self._reserve_scratch(int(self._ends.max(initial=0)))
        self._has_chunks = len(singles) < len(spans)
        self._chunks.begin(spans[len(singles) :], slots[len(singles) :])

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        key_slots, value_slots = self._slots[layer]
        num_rows, size = len(keys), self._num_kv_heads * self._head_dim
        self._write(
            2 * num_rows * size,
            num_rows,
            size,
            row_stride(keys),
            row_stride(values),
            keys.data_ptr(),
            values.data_ptr(),
            self._write_slots.data_ptr(),
            key_slots,
            value_slots,
        )

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        num_singles = len(self._ends)
        assert torch.get_num_threads() <= len(self._sums)
        attended = torch.empty_like(queries, memory_format=torch.contiguous_format)
        if num_singles:
            key_slots, value_slots = self._slots[layer]
            self._attend(
                2 * self._num_keys * self._num_kv_heads * self._head_dim,
                num_singles,
                self._num_kv_heads,
                self._num_heads // self._num_kv_heads,
                self._block_size,
                self._tables.shape[1],
                self._scores.shape[2],
                row_stride(queries),
                queries.data_ptr(),
                key_slots,
                value_slots,
                self._tables.ctypes.data,
                self._ends.ctypes.data,
                attended.data_ptr(),
                self._scores.data_ptr(),
                self._sums.data_ptr(),
            )
        if self._has_chunks:
            attended[num_singles:] = self._chunks.attend(layer, queries[num_singles:])
        return attended

    def _block_tables(self, spans: Sequence[Span]) -> np.typing.NDArray[np.int64]:
        """``[num_spans, most blocks]``, zero beyond what a span's context needs."""
        num_blocks = [-(-span.end // self._block_size) for span in spans]
        tables = np.zeros((len(spans), max(num_blocks, default=0)), dtype=np.int64)
        for table, span, num in zip(tables, spans, num_blocks, strict=True):
            table[:num] = span.block_table[:num]
        return tables

    def _reserve_scratch(self, num_keys: int) -> None:
        num_threads = torch.get_num_threads()
        if len(self._sums) < num_threads:
            self._sums = torch.empty((num_threads, *self._sums.shape[1:]))
        if len(self._scores) < num_threads or self._scores.shape[2] < num_keys:
            length = -(-num_keys // _SCORES_STEP) * _SCORES_STEP
            self._scores = torch.empty((num_threads, self._num_heads, length))
