"""Triton kernels of the CUDA engine. Each is one launch without host synchronisation, so all can be captured.

Rows of a step are padded to a captured size; a padded row has no keys and the slot -1, and is left alone.
Those of the layers take pointers and constants alone, as `CompiledLaunch` wants it: strides and sizes are the
model's, so few are ever compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_kv_kernel(
    keys,
    values,
    slots,
    key_cache,
    value_cache,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store rows of ``SIZE`` elements at their slots. Grid: (num_rows,)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    columns = tl.arange(0, BLOCK)
    inside = (columns < SIZE) & (slot >= 0)
    key = tl.load(keys + row * KEY_STRIDE + columns, mask=inside)
    value = tl.load(values + row * VALUE_STRIDE + columns, mask=inside)
    tl.store(key_cache + slot * SIZE + columns, key, mask=inside)
    tl.store(value_cache + slot * SIZE + columns, value, mask=inside)


@triton.jit
def begin_step_kernel(
    control,
    tables,
    last_tokens,
    token_ids,
    positions,
    slots,
    num_keys,
    table_stride,
    control_stride,
    num_rows,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Unpack a decode step's control block ``[6, control_stride]``, one column a row. Grid: (1,).

    Lines: token id (or ``-1 - r``: what row r of the step before drew), position (-1: padding), column of
    the block table to set (-1: none) and its value; lines 4 and 5 are the sampler's.
    """
    row = tl.arange(0, BLOCK)
    inside = row < num_rows
    token = tl.load(control + row, mask=inside, other=0)
    position = tl.load(control + control_stride + row, mask=inside, other=-1)
    column = tl.load(control + 2 * control_stride + row, mask=inside, other=-1)
    value = tl.load(control + 3 * control_stride + row, mask=inside, other=0)
    drawn = tl.load(last_tokens + (-1 - token), mask=inside & (token < 0), other=0)
    tl.store(token_ids + row, tl.where(token < 0, drawn, token), mask=inside)
    is_real = inside & (position >= 0)
    at = row.to(tl.int64) * table_stride
    tl.store(tables + at + column, value.to(tl.int32), mask=is_real & (column >= 0))
    index = position // BLOCK_SIZE
    known = tl.load(tables + at + index, mask=is_real & (column != index), other=0)
    block = tl.where(column == index, value, known.to(tl.int64))
    tl.store(slots + row, tl.where(is_real, block * BLOCK_SIZE + position % BLOCK_SIZE, -1), mask=inside)
    tl.store(positions + row, tl.where(is_real, position, 0), mask=inside)
    tl.store(num_keys + row, tl.where(is_real, position + 1, 0).to(tl.int32), mask=inside)


@triton.jit
def draw_chunk_kernel(
    logits,
    keys,
    temperatures,
    part_scores,
    part_ids,
    part_best,
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Best token of one chunk of a row's vocabulary. Grid: (num_rows, num_chunks).

    Score: the logit; with a temperature above 0, ``logit / temperature`` plus Gumbel noise that is a
    function of `keys` and the token id alone, as `kvrelay.engine.noise` has it. `part_best` gets the largest
    logit; NaN counts as larger than everything, so that a broken row shows. The lowest id wins a tie.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    best_score = tl.full([], float("-inf"), tl.float64)
    best_id = tl.full([], 0, tl.int32)
    best_logit = tl.full([], float("-inf"), tl.float32)
    for start in range(0, CHUNK, TILE):
        token = chunk * CHUNK + start + tl.arange(0, TILE)
        inside = token < vocab_size
        logit = tl.load(logits + row * vocab_size + token, mask=inside, other=float("-inf")).to(tl.float32)
        logit = tl.where(logit == logit, logit, float("inf"))
        score = logit.to(tl.float64)
        if temperature > 0:
            key = tl.load(keys + row).to(tl.uint64, bitcast=True)
            mixed = token.to(tl.uint64) * 0x9E3779B97F4A7C15 + key
            mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
            mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
            mixed = mixed ^ (mixed >> 31)
            uniform = ((mixed >> 12).to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16
            score = score / temperature - tl.log(-tl.log(uniform))
            score = tl.where(inside, score, float("-inf"))
        tile_score = tl.max(score, 0)
        tile_id = tl.min(tl.where(score == tile_score, token, 0x7FFFFFFF), 0)
        is_better = tile_score > best_score
        best_id = tl.where(is_better, tile_id, best_id)
        best_score = tl.where(is_better, tile_score, best_score)
        best_logit = tl.maximum(best_logit, tl.max(logit, 0))
    place = row * num_chunks + chunk
    tl.store(part_scores + place, best_score)
    tl.store(part_ids + place, best_id)
    tl.store(part_best + place, best_logit)


@triton.jit
def draw_kernel(part_scores, part_ids, part_best, token_ids, best_logits, num_chunks, BLOCK: tl.constexpr):
    """The best of a row's chunks. Grid: (num_rows,)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    inside = chunk < num_chunks
    at = row * num_chunks + chunk
    score = tl.load(part_scores + at, mask=inside, other=float("-inf"))
    token = tl.load(part_ids + at, mask=inside, other=0x7FFFFFFF)
    best = tl.load(part_best + at, mask=inside, other=float("-inf"))
    winner = tl.min(tl.where(score == tl.max(score, 0), token, 0x7FFFFFFF), 0)
    tl.store(token_ids + row, winner.to(tl.int64))
    tl.store(best_logits + row, tl.max(best, 0))


def next_power_of_two(value: int) -> int:
    """The smallest that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()
