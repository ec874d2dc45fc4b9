"""Attention on the CPU, out of torch's own kernels.

Three ways, chosen by a span's own shape, never by its neighbours, so that its result does not depend on
what else is in the batch:

* a prefill chunk attends by itself;
* a single token with a long context attends by itself, in place where its blocks lie in one piece;
* single tokens with short contexts are padded to a few lengths and attend together: there, the cost of a
  call outweighs that of a copy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from kvrelay.engine.attention import Span

_SHORT_KEYS: Final = 256
"""Longest context that is gathered and attended together with others; measured."""
_PAD_KEYS: Final = 64
"""Short contexts are padded to a multiple of this."""


@dataclass(frozen=True, slots=True)
class _Context:
    """One span by itself: its keys lie from `first_slot` on, or, where that is None, in `slots`."""

    rows: slice
    num_keys: int
    first_slot: int | None
    slots: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class _ShortGroup:
    """Single tokens, padded: `rows` ``[n]``, `slots` ``[n * length]``, `mask` ``[n, 1, 1, length]``."""

    rows: Tensor
    slots: Tensor
    mask: Tensor


class CpuAttention:
    """`cache` is ``[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]``."""

    def __init__(self, cache: Tensor, num_heads: int) -> None:
        num_layers, _, _, self._block_size, self._num_kv_heads, self._head_dim = cache.shape
        self._num_heads = num_heads
        self._dtype = cache.dtype
        slots = cache.view(num_layers, 2, -1, self._num_kv_heads, self._head_dim)
        self._slots = [(slots[layer, 0], slots[layer, 1]) for layer in range(num_layers)]
        heads = slots.transpose(2, 3).unsqueeze(2)
        self._heads = [(heads[layer, 0], heads[layer, 1]) for layer in range(num_layers)]
        self._write_slots = torch.empty(0, dtype=torch.int64)
        self._gathered = torch.empty((2, 0, 1, 1))
        """Keys and values of one short group, kept between steps: new pages would cost more than the copy."""
        self._short: list[_ShortGroup] = []
        self._long: list[_Context] = []
        self._chunks: list[_Context] = []

    def prepare_thread(self, max_step_tokens: int, max_model_len: int) -> None:
        return

    def begin(self, spans: Sequence[Span], slots: Tensor) -> None:
        self._write_slots = slots
        self._long, self._chunks = [], []
        short: dict[int, list[tuple[int, Span]]] = defaultdict(list)
        row = 0
        for span in spans:
            if span.num_tokens > 1:
                self._chunks.append(self._context(span, row))
            elif span.end > _SHORT_KEYS:
                self._long.append(self._context(span, row))
            else:
                short[-(-span.end // _PAD_KEYS) * _PAD_KEYS].append((row, span))
            row += span.num_tokens
        self._short = [self._short_group(length, members) for length, members in short.items()]
        num_gathered = max((len(group.slots) for group in self._short), default=0)
        if num_gathered > self._gathered.shape[1]:
            shape = (2, num_gathered, self._num_kv_heads, self._head_dim)
            self._gathered = torch.empty(shape, dtype=self._dtype)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        key_slots, value_slots = self._slots[layer]
        key_slots.index_copy_(0, self._write_slots, keys)
        value_slots.index_copy_(0, self._write_slots, values)

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        attended = torch.empty_like(queries, memory_format=torch.contiguous_format)
        for group in self._short:
            attended.index_copy_(0, group.rows, self._attend_short(layer, queries, group))
        for context in self._long:
            attended[context.rows] = self._attend_long(layer, queries[context.rows], context)
        for context in self._chunks:
            attended[context.rows] = self._attend_chunk(layer, queries[context.rows], context)
        return attended

    def _attend_short(self, layer: int, queries: Tensor, group: _ShortGroup) -> Tensor:
        """The query heads of one KV head are the rows of one small attention."""
        num_rows = len(group.rows)
        grouped = queries.index_select(0, group.rows).view(num_rows, self._num_kv_heads, -1, self._head_dim)
        keys, values = (
            torch.index_select(slots, 0, group.slots, out=gathered[: len(group.slots)])
            .view(num_rows, -1, self._num_kv_heads, self._head_dim)
            .transpose(1, 2)
            for slots, gathered in zip(self._slots[layer], self._gathered, strict=True)
        )
        attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask)
        return attended.reshape(num_rows, self._num_heads, self._head_dim)

    def _attend_long(self, layer: int, queries: Tensor, context: _Context) -> Tensor:
        grouped = queries.reshape(1, self._num_kv_heads, -1, self._head_dim)
        attended = F.scaled_dot_product_attention(grouped, *self._keys_and_values(layer, context))
        return attended.reshape(1, self._num_heads, self._head_dim)

    def _attend_chunk(self, layer: int, queries: Tensor, context: _Context) -> Tensor:
        keys, values = self._keys_and_values(layer, context)
        attended = F.scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            keys,
            values,
            attn_mask=context.mask,
            is_causal=context.mask is None,
            enable_gqa=True,
        )
        return attended.squeeze(0).transpose(0, 1)

    def _keys_and_values(self, layer: int, context: _Context) -> tuple[Tensor, Tensor]:
        """``[1, num_kv_heads, num_keys, head_dim]`` each."""
        if context.slots is None:
            assert context.first_slot is not None
            keys, values = self._heads[layer]
            return (
                keys.narrow(2, context.first_slot, context.num_keys),
                values.narrow(2, context.first_slot, context.num_keys),
            )
        keys, values = (slots.index_select(0, context.slots) for slots in self._slots[layer])
        return keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)

    def _context(self, span: Span, row: int) -> _Context:
        slots = self._slots_of(span)
        in_one_piece = int(slots[-1]) - int(slots[0]) == span.end - 1 and bool((np.diff(slots) == 1).all())
        return _Context(
            rows=slice(row, row + span.num_tokens),
            num_keys=span.end,
            first_slot=int(slots[0]) if in_one_piece else None,
            slots=None if in_one_piece else torch.from_numpy(slots),
            mask=self._causal_mask(span) if span.start and span.num_tokens > 1 else None,
        )

    def _short_group(self, length: int, members: Sequence[tuple[int, Span]]) -> _ShortGroup:
        slots = np.empty((len(members), length), dtype=np.int64)
        mask = torch.zeros((len(members), 1, 1, length), dtype=self._dtype)
        for index, (_, span) in enumerate(members):
            own = self._slots_of(span)
            slots[index, : span.end] = own
            slots[index, span.end :] = own[0]  # Masked; its own, since another's could hold NaN.
            mask[index, ..., span.end :] = float("-inf")
        rows = torch.tensor([row for row, _ in members])
        return _ShortGroup(rows, torch.from_numpy(slots).flatten(), mask)

    def _slots_of(self, span: Span) -> np.typing.NDArray[np.int64]:
        """Where the span's sequence has its tokens ``[0, end)``."""
        num_blocks = -(-span.end // self._block_size)
        blocks = np.array(span.block_table[:num_blocks], dtype=np.int64)
        slots = blocks[:, None] * self._block_size + np.arange(self._block_size)
        return slots.reshape(-1)[: span.end]

    def _causal_mask(self, span: Span) -> Tensor:
        """``[num_tokens, end]``: 0 where a row may look, minus infinity elsewhere."""
        mask = torch.full((span.num_tokens, span.end), float("-inf"), dtype=self._dtype)
        return mask.triu_(span.start + 1)
