"""Attention of single tokens over the paged KV cache, in place: nothing is gathered."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from kvrelay.engine.compiled.arithmetic import (
    FAST_MATH,
    DType,
    Floats,
    Integers,
    advance,
    exp,
    load,
    pointer,
    store,
)
from kvrelay.engine.compiled.kernel import KernelFunction
from kvrelay.engine.compiled.openmp import own_share, thread_index

Heads = tuple[int, int, int, int]
"""First and last (excluded) KV head that are this thread's, number of KV heads, query heads per KV head."""


def attention_kernel(dtype: DType, head_dim: int) -> KernelFunction:
    """For a cache of `dtype`.

    Arguments: the numbers of rows, of KV heads, of query heads per KV head, of tokens per block, of blocks
    per block table; the length of one head's scores in the scratch; the queries' row stride; the addresses
    of queries, key slots ``[num_slots, num_kv_heads, head_dim]``, value slots, block tables
    ``[num_rows, num_blocks]`` (int64), context lengths ``[num_rows]`` (int64), result
    ``[num_rows, num_heads, head_dim]``; and of scratch (float32) for scores
    ``[num_threads, num_heads, scores_length]`` and for vectors ``[num_threads, 2, num_heads, head_dim]``.
    """
    scale = np.float32(1 / math.sqrt(head_dim))

    def attend(arguments: Integers) -> None:
        num_kv_heads, group, block_size = arguments[1], arguments[2], arguments[3]
        table_length, scores_length, query_stride = arguments[4], arguments[5], arguments[6]
        queries, result = pointer(arguments[7], dtype), pointer(arguments[12], dtype)
        keys, values = pointer(arguments[8], dtype), pointer(arguments[9], dtype)
        tables, ends = pointer(arguments[10], np.int64), pointer(arguments[11], np.int64)
        row_size = num_kv_heads * group * head_dim
        own_scores = thread_index() * num_kv_heads * group * scores_length
        scores = advance(pointer(arguments[13], np.float32), own_scores)
        scaled = advance(pointer(arguments[14], np.float32), thread_index() * 2 * row_size)
        sums = advance(scaled, row_size)
        first, last = own_share(arguments[0] * num_kv_heads)
        for row in range(first // num_kv_heads, (last + num_kv_heads - 1) // num_kv_heads):
            first_head = max(first - row * num_kv_heads, 0)
            last_head = min(last - row * num_kv_heads, num_kv_heads)
            heads = (first_head, last_head, num_kv_heads, group)
            end, table = ends[row], advance(tables, row * table_length)
            for index in range(first_head * group * head_dim, last_head * group * head_dim):
                scaled[index] = load(queries, row * query_stride + index) * scale
                sums[index] = np.float32(0)
            _score_context(scaled, keys, table, end, block_size, heads, head_dim, scores, scores_length)
            for head in range(first_head * group, last_head * group):
                _softmax(advance(scores, head * scores_length), end)
            _sum_context(sums, values, table, end, block_size, heads, head_dim, scores, scores_length)
            for index in range(first_head * group * head_dim, last_head * group * head_dim):
                store(result, row * row_size + index, sums[index])

    return attend


@njit(fastmath=FAST_MATH)
def _score_context(
    queries: Floats,
    keys: Floats,
    table: Integers,
    num_keys: int,
    block_size: int,
    heads: Heads,
    head_dim: int,
    scores: Floats,
    scores_length: int,
) -> None:
    """Queries times keys, block by block, all heads of a block together: they are neighbours in memory."""
    first_head, last_head, num_kv_heads, group = heads
    for start in range(0, num_keys, block_size):
        slot = table[start // block_size] * block_size
        for kv_head in range(first_head, last_head):
            block_keys = advance(keys, (slot * num_kv_heads + kv_head) * head_dim)
            for head in range(kv_head * group, (kv_head + 1) * group):
                _score(
                    advance(queries, head * head_dim),
                    block_keys,
                    num_kv_heads * head_dim,
                    min(block_size, num_keys - start),
                    head_dim,
                    advance(scores, head * scores_length + start),
                )


@njit(fastmath=FAST_MATH)
def _sum_context(
    sums: Floats,
    values: Floats,
    table: Integers,
    num_keys: int,
    block_size: int,
    heads: Heads,
    head_dim: int,
    weights: Floats,
    weights_length: int,
) -> None:
    """Add weights times values, walking as `_score_context` does."""
    first_head, last_head, num_kv_heads, group = heads
    for start in range(0, num_keys, block_size):
        slot = table[start // block_size] * block_size
        for kv_head in range(first_head, last_head):
            block_values = advance(values, (slot * num_kv_heads + kv_head) * head_dim)
            for head in range(kv_head * group, (kv_head + 1) * group):
                _add_weighted(
                    advance(sums, head * head_dim),
                    block_values,
                    num_kv_heads * head_dim,
                    min(block_size, num_keys - start),
                    head_dim,
                    advance(weights, head * weights_length + start),
                )


@njit(fastmath=FAST_MATH)
def _score(query: Floats, keys: Floats, stride: int, num_keys: int, head_dim: int, scores: Floats) -> None:
    for key in range(num_keys):
        score = np.float32(0)
        for index in range(head_dim):
            score += query[index] * load(keys, key * stride + index)
        scores[key] = score


@njit(fastmath=FAST_MATH)
def _softmax(scores: Floats, num_keys: int) -> None:
    """In place. One NaN makes them all NaN."""
    highest = np.float32(-np.inf)
    for key in range(num_keys):
        highest = max(highest, scores[key])
    total = np.float32(0)
    for key in range(num_keys):
        weight = exp(scores[key] - highest)
        scores[key] = weight
        total += weight
    for key in range(num_keys):
        scores[key] /= total


@njit(fastmath=FAST_MATH)
def _add_weighted(
    sums: Floats, values: Floats, stride: int, num_keys: int, head_dim: int, weights: Floats
) -> None:
    """Four keys at a time, so that the sums are loaded and stored a quarter as often."""
    key = 0
    while key + 4 <= num_keys:
        for index in range(head_dim):
            at = key * stride + index
            sums[index] += (
                weights[key] * load(values, at)
                + weights[key + 1] * load(values, at + stride)
                + weights[key + 2] * load(values, at + 2 * stride)
                + weights[key + 3] * load(values, at + 3 * stride)
            )
        key += 4
    while key < num_keys:
        for index in range(head_dim):
            sums[index] += weights[key] * load(values, key * stride + index)
        key += 1
