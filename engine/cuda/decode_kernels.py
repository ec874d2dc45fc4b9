"""Triton kernels of attention of single tokens to their paged keys: how the work is split, and the work.

A row's keys are taken in tiles, some tiles an item, and each item goes to a program. So a row with a long
context is shared by many, whatever else is in the batch: else a step would take as long as one program needs
for the whole of that row. Source: flash-decoding (Dao, Haziza, Massa, Sizov 2023) for the parts and their
merge; stream-K (Osama et al. 2023) for the even split.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plan_items_kernel(
    num_keys,
    items,
    first_items,
    split_rows,
    num_rows,
    capacity,
    TILE: tl.constexpr,
    TARGET: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ITEM_BLOCK: tl.constexpr,
):
    """Split the rows' keys into at most ``num_rows + TARGET`` items of about as many tiles each. Grid: (1,).

    `items` ``[capacity, 8]`` int32: row (-1: none), first tile, tile behind the last, how many items the row
    has, its keys; three are not used. Row r's items are ``first_items[r]`` to ``first_items[r + 1]``; without
    keys it has one, without tiles. `split_rows` ``[>= min(num_rows, TARGET)]``: those with several, then -1.
    """
    row = tl.arange(0, ROW_BLOCK)
    inside = row < num_rows
    keys = tl.load(num_keys + row, mask=inside, other=0)
    tiles = tl.cdiv(keys, TILE)
    wanted = tl.maximum(tl.cdiv(tl.sum(tiles, 0), TARGET), 1)
    num_items = tl.where(inside, tl.maximum((2 * tiles + wanted) // (2 * wanted), 1), 0)
    tiles_per_item = tl.cdiv(tiles, tl.maximum(num_items, 1))
    end = tl.cumsum(num_items, 0)
    first_item = end - num_items
    tl.store(first_items + row, first_item, mask=inside)
    tl.store(first_items + 1 + row, end, mask=inside)
    for index in range(0, tl.max(num_items, 0)):
        has_it = index < num_items
        place = items + (first_item + index) * 8
        first_tile = tl.minimum(index * tiles_per_item, tiles)
        tl.store(place, row, mask=has_it)
        tl.store(place + 1, first_tile, mask=has_it)
        tl.store(place + 2, tl.minimum(first_tile + tiles_per_item, tiles), mask=has_it)
        tl.store(place + 3, num_items, mask=has_it)
        tl.store(place + 4, keys, mask=has_it)
    item = tl.arange(0, ITEM_BLOCK)
    tl.store(items + item * 8, -1, mask=(item >= tl.sum(num_items, 0)) & (item < capacity))
    is_split = num_items > 1
    nth = tl.cumsum(is_split.to(tl.int32), 0)
    tl.store(split_rows + nth - 1, row, mask=is_split)
    num_split = tl.sum(is_split.to(tl.int32), 0)
    tl.store(split_rows + item, -1, mask=(item >= num_split) & (item < tl.minimum(num_rows, TARGET)))


@triton.jit
def paged_decode_kernel(
    queries,
    key_cache,
    value_cache,
    tables,
    items,
    out,
    partial_out,
    partial_lse,
    QUERY_STRIDE: tl.constexpr,
    TABLE_STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One item: a query token against some of its keys; the query heads of one KV head are one tile.

    Of a row with several items each leaves its normalised part and log-sum-exp (base 2) for
    `merge_items_kernel`, in `partial_out` ``[capacity, num_heads, DIM]`` and `partial_lse`
    ``[capacity, num_heads]``; the result of a row with one goes straight to `out`.
    Grid: (KV_HEADS, capacity), so that what is no item comes last: between the others it would leave some
    multiprocessors with fewer of them.
    """
    kv_head = tl.program_id(0)
    item = tl.program_id(1).to(tl.int64)
    row = tl.load(items + item * 8).to(tl.int64)
    first = tl.load(items + item * 8 + 1)
    last = tl.load(items + item * 8 + 2)
    num_items = tl.load(items + item * 8 + 3)
    keys = tl.load(items + item * 8 + 4)
    if row < 0:
        return

    group = tl.arange(0, GROUP)
    column = tl.arange(0, DIM_BLOCK)
    is_head = group < HEADS_PER_KV
    is_column = column < DIM
    head = kv_head * HEADS_PER_KV + group
    num_heads = KV_HEADS * HEADS_PER_KV
    query_mask = is_head[:, None] & is_column[None, :]
    query = tl.load(
        queries + row * QUERY_STRIDE + head[:, None] * DIM + column[None, :], mask=query_mask, other=0.0
    )
    highest = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    gathered = tl.zeros([GROUP, DIM_BLOCK], tl.float32)
    scale_log2 = SCALE * 1.4426950408889634
    for tile in range(first, last):
        position = tile * TILE + tl.arange(0, TILE)
        inside = position < keys
        block = tl.load(tables + row * TABLE_STRIDE + position // BLOCK_SIZE, mask=inside, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        offset = (slot * KV_HEADS + kv_head)[:, None] * DIM + column[None, :]
        cache_mask = inside[:, None] & is_column[None, :]
        key = tl.load(key_cache + offset, mask=cache_mask, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        score = tl.where(inside[None, :], score, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        value = tl.load(value_cache + offset, mask=cache_mask, other=0.0)
        total = total * decay + tl.sum(weight, 1)
        gathered = gathered * decay[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        highest = new_highest
    safe = tl.where(total > 0, total, 1.0)
    normalised = gathered / safe[:, None]
    if num_items == 1:
        place = out + (row * num_heads + head[:, None]) * DIM + column[None, :]
        tl.store(place, normalised.to(out.dtype.element_ty), mask=query_mask)
        return
    part = item * num_heads + head
    tl.store(partial_out + part[:, None] * DIM + column[None, :], normalised, mask=query_mask)
    lse = tl.where(last > first, highest + tl.log2(safe), float("-inf"))
    tl.store(partial_lse + part, lse, mask=is_head)


@triton.jit
def merge_items_kernel(
    partial_out,
    partial_lse,
    first_items,
    split_rows,
    out,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Weigh the parts of rows with several items by their log-sum-exp, ``MERGED`` at once.
    Grid: (NUM_HEADS, as many as `split_rows`)."""
    head = tl.program_id(0)
    row = tl.load(split_rows + tl.program_id(1)).to(tl.int64)
    if row < 0:
        return
    first = tl.load(first_items + row)
    end = tl.load(first_items + row + 1)
    column = tl.arange(0, DIM_BLOCK)
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    merged = tl.zeros([DIM_BLOCK], tl.float32)
    for start in range(first, end, MERGED):
        item = start + tl.arange(0, MERGED)
        part = item.to(tl.int64) * NUM_HEADS + head
        lse = tl.load(partial_lse + part, mask=item < end, other=float("-inf"))
        values = tl.load(
            partial_out + part[:, None] * DIM + column[None, :],
            mask=(item < end)[:, None] & (column < DIM)[None, :],
            other=0.0,
        )
        new_highest = tl.maximum(highest, tl.max(lse, 0))
        weight = tl.exp2(lse - new_highest)
        decay = tl.exp2(highest - new_highest)
        total = total * decay + tl.sum(weight, 0)
        merged = merged * decay + tl.sum(values * weight[:, None], 0)
        highest = new_highest
    place = row * NUM_HEADS + head
    tl.store(out + place * DIM + column, (merged / total).to(out.dtype.element_ty), mask=column < DIM)
