"""What kernels are made of: pointers, bfloat16, the exponential function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload

Integers = Sequence[int]
"""A pointer to int64."""
DType = type[np.float32] | type[np.uint16]
"""Of activations and cache; uint16 stands for bfloat16, which numba lacks."""

FAST_MATH: Final = {"reassoc", "contract", "nsz"}
"""Sums may be split into vector lanes. NaN and infinity keep their meaning."""

_LOG2_E: Final = np.float32(1.4426950408889634)
_LN_2: Final = np.float32(0.6931471805599453)
_MIN_EXPONENT: Final = np.float32(-126)
_MAX_EXPONENT: Final = np.float32(127)


class Floats(Protocol):
    """A pointer to float32 or bfloat16. Nothing checks an index."""

    def __getitem__(self, index: int) -> np.float32: ...

    def __setitem__(self, index: int, value: np.float32) -> None: ...


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def pointer(typing_context, address, dtype):  # type: ignore[no-untyped-def]
    """The integer `address` as a pointer to `dtype`."""
    result = types.CPointer(dtype.dtype)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(result))

    return result(types.int64, dtype), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def advance(typing_context, values, num_elements):  # type: ignore[no-untyped-def]
    """``values + num_elements``, as in C."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.gep(arguments[0], [arguments[1]])

    return values(values, types.int64), generate


def load(values: Floats, index: int) -> np.float32:
    """``values[index]`` as float32."""
    raise NotImplementedError("only inside a kernel")


@overload(load)
def _load(values, index):  # type: ignore[no-untyped-def]
    if values.dtype == types.float32:
        return lambda values, index: values[index]
    return lambda values, index: np.uint32(np.uint32(values[index]) << np.uint32(16)).view(np.float32)


def store(values: Floats, index: int, value: np.float32) -> None:
    """``values[index] = value``, a float32, rounded half to even where it has to be."""
    raise NotImplementedError("only inside a kernel")


@overload(store)
def _store(values, index, value):  # type: ignore[no-untyped-def]
    def store_float32(values, index, value):  # type: ignore[no-untyped-def]
        values[index] = value

    def store_bfloat16(values, index, value):  # type: ignore[no-untyped-def]
        bits = np.float32(value).view(np.uint32)
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(bits + odd) + np.uint32(0x7FFF))
        is_nan = value != value  # Rounding could carry its bits over into infinity or zero.
        values[index] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded >> np.uint32(16))

    return store_float32 if values.dtype == types.float32 else store_bfloat16


@njit(fastmath=FAST_MATH)
def exp(x: np.float32) -> np.float32:
    """e to the float32 `x`, to a few units in the last place, written so that loops over it become vectors.

    Results below 2**-126 become 0, those beyond 2**127 infinity.
    """
    exponent = np.floor(x * _LOG2_E + np.float32(0.5))
    if exponent < _MIN_EXPONENT:
        return np.float32(0)
    if exponent > _MAX_EXPONENT:
        return np.float32(np.inf)
    rest = x - exponent * _LN_2
    power = np.int32((np.int32(exponent) + np.int32(127)) << np.int32(23)).view(np.float32)
    result: np.float32 = np.float32(1 / 720) * rest + np.float32(1 / 120)
    result = result * rest + np.float32(1 / 24)
    result = result * rest + np.float32(1 / 6)
    result = result * rest + np.float32(1 / 2)
    result = result * rest + np.float32(1)
    result = result * rest + np.float32(1)
    result *= power
    return result
