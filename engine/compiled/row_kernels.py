"""What a decoder layer does to each row by itself, each in one or two passes over the row."""

from __future__ import annotations

import numpy as np

from kvrelay.engine.compiled.arithmetic import DType, Integers, exp, load, pointer, store
from kvrelay.engine.compiled.kernel import KernelFunction
from kvrelay.engine.compiled.openmp import own_share


def rms_norm_kernel(dtype: DType) -> KernelFunction:
    """Arguments: the numbers of rows and of columns; the addresses of rows, weight, result, epsilon
    (float32)."""

    def rms_norm(arguments: Integers) -> None:
        size = arguments[1]
        rows, weight = pointer(arguments[2], dtype), pointer(arguments[3], dtype)
        result, epsilon = pointer(arguments[4], dtype), pointer(arguments[5], np.float32)
        first, last = own_share(arguments[0])
        for row in range(first, last):
            start = row * size
            total = np.float32(0)
            for index in range(size):
                value = load(rows, start + index)
                total += value * value
            scale = np.float32(1) / np.sqrt(total / np.float32(size) + epsilon[0])
            for index in range(size):
                store(result, start + index, load(rows, start + index) * scale * load(weight, index))

    return rms_norm


def gate_kernel(dtype: DType) -> KernelFunction:
    """``silu(gate) * up``. Arguments: the numbers of rows and of columns; the addresses of
    ``[num_rows, 2, num_columns]``, gate first, and of the result."""

    def gate(arguments: Integers) -> None:
        size = arguments[1]
        gate_up, result = pointer(arguments[2], dtype), pointer(arguments[3], dtype)
        first, last = own_share(arguments[0])
        for row in range(first, last):
            start = row * 2 * size
            for index in range(size):
                value = load(gate_up, start + index)
                silu = value / (np.float32(1) + exp(-value))
                store(result, row * size + index, silu * load(gate_up, start + size + index))

    return gate


def rotate_kernel(dtype: DType, head_dim: int) -> KernelFunction:
    """Rotary positions, in place. Arguments: the numbers of rows and of heads; the heads' row stride; the
    addresses of heads, cosines ``[num_rows, head_dim]``, sines ``[num_rows, head_dim // 2]``."""
    half = head_dim // 2

    def rotate(arguments: Integers) -> None:
        num_heads, stride = arguments[1], arguments[2]
        heads = pointer(arguments[3], dtype)
        cosines, sines = pointer(arguments[4], dtype), pointer(arguments[5], dtype)
        first, last = own_share(arguments[0])
        for row in range(first, last):
            for head in range(num_heads):
                start = row * stride + head * head_dim
                for index in range(half):
                    cosine = load(cosines, row * head_dim + index)
                    sine = load(sines, row * half + index)
                    left, right = load(heads, start + index), load(heads, start + half + index)
                    store(heads, start + index, left * cosine - right * sine)
                    store(heads, start + half + index, right * cosine + left * sine)

    return rotate


def write_kernel(dtype: DType) -> KernelFunction:
    """Rows into cache slots. Arguments: the numbers of rows and of columns; the row strides of keys and of
    values; the addresses of keys, values, slots (int64), key slots, value slots."""

    def write(arguments: Integers) -> None:
        size, key_stride, value_stride = arguments[1], arguments[2], arguments[3]
        keys, values = pointer(arguments[4], dtype), pointer(arguments[5], dtype)
        slots = pointer(arguments[6], np.int64)
        key_slots, value_slots = pointer(arguments[7], dtype), pointer(arguments[8], dtype)
        first, last = own_share(arguments[0])
        for row in range(first, last):
            start = slots[row] * size
            for index in range(size):
                key_slots[start + index] = keys[row * key_stride + index]
            for index in range(size):
                value_slots[start + index] = values[row * value_stride + index]

    return write
