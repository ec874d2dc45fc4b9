"""Attention of single tokens to their paged keys, by our own kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvrelay.engine.cuda.compiled_launch import CompiledLaunch
from kvrelay.engine.cuda.decode_kernels import merge_items_kernel, paged_decode_kernel, plan_items_kernel
from kvrelay.engine.cuda.kernels import next_power_of_two

_TILE: Final = 64
"""Keys that a program takes at once."""
_PROGRAMS: Final = 352
"""To split the keys of a step over; with those of further short rows they still run at once on an H100."""
_MERGED: Final = 32
"""Parts of a row that are merged at once."""
_ITEM_FIELDS: Final = 8


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Of single tokens, on the device: `tables` ``[>= num_rows, max_blocks]`` int32, `num_keys`
    ``[>= num_rows]`` int32."""

    num_rows: int
    tables: Tensor
    num_keys: Tensor


@dataclass(frozen=True, slots=True)
class _Work:
    """How a step is split, and room for the parts: see the kernels."""

    items: Tensor
    first_items: Tensor
    split_rows: Tensor
    partial_out: Tensor
    partial_lse: Tensor


class DecodeAttention:
    """For steps of one model on `device`; `begin` before the first layer of each. Can be captured."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, device: torch.device
    ) -> None:
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._block_size = block_size
        self._device = device
        self._target_items = max(1, _PROGRAMS // num_kv_heads)
        self._launch_items = CompiledLaunch(paged_decode_kernel)
        self._launch_merge = CompiledLaunch(merge_items_kernel)
        nothing = torch.empty(0, dtype=torch.int32, device=device)
        self._inputs = DecodeInputs(0, nothing, nothing)
        self._work = _Work(nothing, nothing, nothing, nothing, nothing)

    @property
    def num_rows(self) -> int:
        """Of the step that has begun."""
        return self._inputs.num_rows

    def begin(self, inputs: DecodeInputs) -> None:
        """Queue what all layers of the step share."""
        self._inputs = inputs
        if not inputs.num_rows:
            return
        capacity = inputs.num_rows + self._target_items
        self._work = self._room_for(inputs.num_rows, capacity)
        plan_items_kernel[(1,)](
            inputs.num_keys,
            self._work.items,
            self._work.first_items,
            self._work.split_rows,
            inputs.num_rows,
            capacity,
            TILE=_TILE,
            TARGET=self._target_items,
            ROW_BLOCK=next_power_of_two(inputs.num_rows),
            ITEM_BLOCK=next_power_of_two(capacity),
        )

    def attend(self, queries: Tensor, key_cache: Tensor, value_cache: Tensor, out: Tensor) -> None:
        """Queue one layer: the first `num_rows` of `queries` and `out` ``[>= num_rows, num_heads, head_dim]``
        over caches ``[num_slots, num_kv_heads, head_dim]``."""
        inputs, work, head_dim = self._inputs, self._work, self._head_dim
        per_kv = self._num_heads // self._num_kv_heads
        self._launch_items(
            (self._num_kv_heads, work.items.shape[0], 1),
            (
                queries,
                key_cache,
                value_cache,
                inputs.tables,
                work.items,
                out,
                work.partial_out,
                work.partial_lse,
            ),
            (
                queries.stride(0),
                inputs.tables.stride(0),
                head_dim**-0.5,
                per_kv,
                max(16, next_power_of_two(per_kv)),
                self._num_kv_heads,
                head_dim,
                max(16, next_power_of_two(head_dim)),
                self._block_size,
                _TILE,
            ),
        )
        self._launch_merge(
            (self._num_heads, work.split_rows.shape[0], 1),
            (work.partial_out, work.partial_lse, work.first_items, work.split_rows, out),
            (self._num_heads, head_dim, next_power_of_two(head_dim), _MERGED),
        )

    def _room_for(self, num_rows: int, capacity: int) -> _Work:
        return _Work(
            self._empty(capacity, _ITEM_FIELDS, dtype=torch.int32),
            self._empty(num_rows + 1, dtype=torch.int32),
            self._empty(min(num_rows, self._target_items), dtype=torch.int32),
            self._empty(capacity, self._num_heads, self._head_dim),
            self._empty(capacity, self._num_heads),
        )

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)
