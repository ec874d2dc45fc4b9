"""Chunks that are padded before cuDNN attends to them, or left where they lie."""

from __future__ import annotations

import pytest
import torch

from kvrelay.engine.cuda.chunk_padding import ChunkPadding, ChunkRows

HEADS, KV_HEADS, DIM = 4, 2, 8
ROW = (HEADS + 2 * KV_HEADS) * DIM


def padding() -> ChunkPadding:
    return ChunkPadding(HEADS, KV_HEADS, DIM, torch.float32, torch.device("cpu"))


def projected(num_rows: int) -> ChunkRows:
    """As a model's one product leaves queries, keys and values."""
    rows = torch.randn(num_rows, ROW)
    queries, keys, values = torch.split(rows, [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], 1)
    return ChunkRows(
        queries.view(num_rows, HEADS, DIM),
        keys.view(num_rows, KV_HEADS, DIM),
        values.view(num_rows, KV_HEADS, DIM),
    )


def apart(num_rows: int) -> ChunkRows:
    return ChunkRows(*(rows.contiguous() for rows in projected(num_rows)))


def keys_normed(num_rows: int) -> ChunkRows:
    """Queries and keys side by side, the values elsewhere, as norms of single heads leave them."""
    found = projected(num_rows)
    queries, keys = torch.cat((found.queries, found.keys), 1).split([HEADS, KV_HEADS], 1)
    return ChunkRows(queries, keys, found.values)


def swapped(num_rows: int) -> ChunkRows:
    """The strides that plans are made for, but not one behind the other."""
    found = projected(num_rows)
    return ChunkRows(found.queries, found.values, found.keys)


def test_a_chunk_of_the_length_stays_where_it_lies() -> None:
    chunk = projected(12)
    padded = padding().pad(chunk, 12)
    assert [rows.data_ptr() for rows in padded] == [rows.data_ptr() for rows in chunk]


@pytest.mark.parametrize("draw", [projected, apart, keys_normed, swapped])
@pytest.mark.parametrize("length", [12, 16])
def test_other_chunks_are_copied_to_the_same_strides(draw: object, length: int) -> None:
    assert callable(draw)
    chunk = draw(12)
    padded = padding().pad(chunk, length)
    for rows, original in zip(padded, chunk, strict=True):
        assert torch.equal(rows[:12], original)
        assert not rows[12:].any()
        assert rows.shape == (length, *original.shape[1:])
        assert rows.stride() == (ROW, DIM, 1)


def test_what_is_not_finite_in_one_chunk_does_not_pad_the_next() -> None:
    one = padding()
    long = projected(16)
    for rows in long:
        rows.fill_(float("nan"))
    one.pad(long.first(14), 16)
    for num_rows in (12, 5, 7, 13):
        padded = one.pad(projected(num_rows), 16)
        assert all(torch.isfinite(rows).all() for rows in padded)
        assert not any(rows[num_rows:].any() for rows in padded)


def test_chunks_whose_strides_are_drawn_for_plans_are_not_copied() -> None:
    one = padding()
    chunk = one.draw(9)
    assert one.pad(chunk, 9) is chunk
    assert one.pad(chunk.first(4), 4).keys.data_ptr() == chunk.keys.data_ptr()
