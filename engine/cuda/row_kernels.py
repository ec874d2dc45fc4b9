"""Triton kernels of the CUDA engine's row operations; importing this needs Triton.

Each takes pointers and constants alone, as `CompiledLaunch` wants it: strides and sizes are the model's.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    rows,
    weight,
    out,
    ROW_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out[r] = rows[r] / rms(rows[r]) * weight``, in float32. Grid: (num_rows,)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    values = tl.load(rows + row * ROW_STRIDE + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / SIZE + EPSILON)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + columns, (values * scale * weights).to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_heads_kernel(
    heads,
    query_weight,
    key_weight,
    ROW_STRIDE: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    EPSILON: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    """Norm of each head by itself, in place, of ``[num_rows, NUM_HEADS, DIM]``, queries first. Grid:
    (num_rows, head blocks)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    column = tl.arange(0, DIM_BLOCK)
    inside = (head < NUM_HEADS)[:, None] & (column < DIM)[None, :]
    at = heads + row * ROW_STRIDE + head[:, None] * DIM + column[None, :]
    values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / DIM + EPSILON)
    of_query = tl.load(query_weight + column, mask=column < DIM, other=0.0).to(tl.float32)
    of_key = tl.load(key_weight + column, mask=column < DIM, other=0.0).to(tl.float32)
    weights = tl.where((head < NUM_QUERIES)[:, None], of_query[None, :], of_key[None, :])
    tl.store(at, (values * scale[:, None] * weights).to(heads.dtype.element_ty), mask=inside)


@triton.jit
def gate_kernel(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """``silu(gate) * up`` of ``[num_rows, 2 * SIZE]``, gate first. Grid: (num_rows, blocks of SIZE)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * SIZE + columns, gated.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(
    heads,
    cosines,
    sines,
    ROW_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
):
    """Rotary positions in place, of ``[num_rows, NUM_HEADS, 2 * HALF]``. Grid: (num_rows, head blocks)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    column = tl.arange(0, HALF_BLOCK)
    inside = (head < NUM_HEADS)[:, None] & (column < HALF)[None, :]
    cosine = tl.load(cosines + row * 2 * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    sine = tl.load(sines + row * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    first = heads + row * ROW_STRIDE + head[:, None] * (2 * HALF) + column[None, :]
    low = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(first + HALF, mask=inside, other=0.0).to(tl.float32)
    kind = heads.dtype.element_ty
    tl.store(first, (low * cosine[None, :] - high * sine[None, :]).to(kind), mask=inside)
    tl.store(first + HALF, (high * cosine[None, :] + low * sine[None, :]).to(kind), mask=inside)
