"""Attention of the CUDA engine: our paged kernel for single tokens, libraries' for prefill chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvrelay.engine.attention import Span
from kvrelay.engine.cuda.compiled_launch import CompiledLaunch
from kvrelay.engine.cuda.decode_attention import DecodeAttention, DecodeInputs
from kvrelay.engine.cuda.kernels import next_power_of_two, write_kv_kernel
from kvrelay.engine.cuda.prefill_attention import PrefillAttention


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A prefill chunk: `slots` ``[num_keys]`` of what lies before it, or None: it is the first."""

    rows: slice
    slots: Tensor | None


class CudaAttention:
    """`cache` is ``[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]`` on one device."""

    def __init__(self, cache: Tensor, num_heads: int, max_blocks: int) -> None:
        num_layers, _, _, self._block_size, self._num_kv_heads, self._head_dim = cache.shape
        self._max_blocks = max_blocks
        self._device = cache.device
        self._prefill = PrefillAttention(
            num_heads, self._num_kv_heads, self._head_dim, cache.dtype, cache.device
        )
        self._launch_write = CompiledLaunch(write_kv_kernel)
        self._single = DecodeAttention(
            num_heads, self._num_kv_heads, self._head_dim, self._block_size, cache.device
        )
        slots = cache.view(num_layers, 2, -1, self._num_kv_heads, self._head_dim)
        self._layers = [(slots[layer, 0], slots[layer, 1]) for layer in range(num_layers)]
        self._write_slots = torch.empty(0, dtype=torch.int64, device=cache.device)
        self._chunks: list[_Chunk] = []
        self._fresh: tuple[Tensor, Tensor] | None = None

    def prepare_thread(self, max_step_tokens: int, max_model_len: int) -> None:
        self._prefill.prepare_thread(min(max_step_tokens, max_model_len), max_model_len)

    def begin(self, spans: Sequence[Span], slots: Tensor) -> None:
        num_single = sum(span.num_tokens == 1 for span in spans)
        tables = np.zeros((max(num_single, 1), self._max_blocks), dtype=np.int32)
        num_keys = np.zeros(max(num_single, 1), dtype=np.int32)
        self._chunks = []
        row = 0
        for span in spans:
            if span.num_tokens == 1:
                num_blocks = -(-span.end // self._block_size)
                tables[row, :num_blocks] = span.block_table[:num_blocks]
                num_keys[row] = span.end
            else:
                rows = slice(row, row + span.num_tokens)
                self._chunks.append(_Chunk(rows, self._slots_before(span) if span.start else None))
            row += span.num_tokens
        self.begin_decode(
            DecodeInputs(num_single, self._upload(tables), self._upload(num_keys)),
            slots.pin_memory().to(self._device, non_blocking=True),
        )

    def begin_decode(self, decode: DecodeInputs, slots: Tensor) -> None:
        """A step whose single tokens' inputs are on the device already; with no other rows it can be
        captured."""
        self._single.begin(decode)
        self._write_slots = slots
        if decode.num_rows == slots.shape[0]:
            self._chunks = []

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        key_cache, value_cache = self._layers[layer]
        size = self._num_kv_heads * self._head_dim
        self._launch_write(
            (keys.shape[0], 1, 1),
            (keys, values, self._write_slots, key_cache, value_cache),
            (keys.stride(0), values.stride(0), size, next_power_of_two(size)),
        )
        self._fresh = (keys, values)

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        if len(self._chunks) == 1 and not self._single.num_rows:
            return self._attend_chunk(layer, queries, self._chunks[0])
        attended = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        if self._single.num_rows:
            self._single.attend(queries, *self._layers[layer], attended)
        for chunk in self._chunks:
            attended[chunk.rows] = self._attend_chunk(layer, queries[chunk.rows], chunk)
        return attended

    def _attend_chunk(self, layer: int, queries: Tensor, chunk: _Chunk) -> Tensor:
        assert self._fresh is not None
        keys, values = self._fresh
        if keys.shape[0] != queries.shape[0]:
            keys, values = keys[chunk.rows], values[chunk.rows]
        if chunk.slots is None:
            return self._prefill.attend(queries, keys, values)
        earlier_keys, earlier_values = (cache.index_select(0, chunk.slots) for cache in self._layers[layer])
        return self._prefill.attend_after(queries, keys, values, earlier_keys, earlier_values)

    def _slots_before(self, span: Span) -> Tensor:
        num_blocks = -(-span.start // self._block_size)
        blocks = np.asarray(span.block_table[:num_blocks], dtype=np.int64)
        slots = (blocks[:, None] * self._block_size + np.arange(self._block_size)).ravel()[: span.start]
        return self._upload(slots)

    def _upload(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
        return torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)
