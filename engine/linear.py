"""Matrix products with constant weights, packed once for the CPU they run on.

oneDNN keeps a packed weight in the blocked order that its kernels read. Against torch's default for
float32 on the CPU this is two to four times as fast from 2 to 64 rows, and each row's result is the same
bits however many rows are computed together, which keeps a sequence's tokens independent of its batch.
"""

from __future__ import annotations

import ctypes
from typing import Final, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

_ROWS_HINT: Final = 64
"""Rows that oneDNN is told to pack for; measured best from 1 to 512 rows."""


class Linear(Protocol):
    """``y = x @ weight.T + bias``, for ``x`` of ``[num_rows, in_features]``."""

    def __call__(self, rows: Tensor) -> Tensor: ...

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        """``residual + y``; may mutate and return `residual`."""
        ...

    def replace(self, residual: Tensor, rows: Tensor) -> Tensor:
        """``y``, in the shape of `residual`, which it may overwrite and return."""
        ...


class Embedding(Protocol):
    """Rows of a matrix ``[vocab_size, hidden_size]`` by token id."""

    def __call__(self, token_ids: Tensor) -> Tensor: ...


class PlainLinear:
    """The weight as it is: ``[out_features, in_features]``."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self._weight, self._bias)

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        return residual + F.linear(rows, self._weight, self._bias)

    def replace(self, residual: Tensor, rows: Tensor) -> Tensor:
        return self(rows)


class PlainEmbedding:
    """The matrix as it is."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, token_ids: Tensor) -> Tensor:
        return self._weight.index_select(0, token_ids)


class PackedLinear:
    """A weight in oneDNN's order; the given one may be dropped."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        self._bias = bias
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._multiply_add = torch.ops.mkldnn._linear_pointwise.binary
        self._needs_two_rows = self._one_row_differs(weight)

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.shape[0] == 1 and self._needs_two_rows:
            return self(rows.expand(2, -1).contiguous())[:1]
        result: Tensor = self._multiply(rows, self.packed, self._bias, "none", [], "")
        return result

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        if rows.shape[0] == 1 and self._needs_two_rows:
            return residual + self(rows)
        result: Tensor = self._multiply_add(rows, residual, self.packed, self._bias, "add")
        return result

    def replace(self, residual: Tensor, rows: Tensor) -> Tensor:
        return self(rows)

    def _one_row_differs(self, weight: Tensor) -> bool:
        """Whether one row alone is summed in another order than among others (some shapes, some CPUs)."""
        self._needs_two_rows = False
        rows = torch.linspace(-1, 1, 2 * weight.shape[1]).sin_().view(2, -1).to(weight.dtype)
        return not torch.equal(self(rows[:1]), self(rows)[:1])


class PackedEmbedding:
    """Looks tokens up in a packed weight, so that an embedding tied to the output layer needs no second copy.

    oneDNN's order for these weights is ``[rows / 64, in / v, 64, v]``, v = 2 for bfloat16. It is not part
    of any interface: `try_build` compares every row with the original and gives up where one differs.
    """

    _BLOCK_ROWS: Final = 64

    def __init__(self, linear: PackedLinear, view: Tensor) -> None:
        self._keeps_memory_alive = linear
        self._view = view

    @classmethod
    def try_build(cls, linear: PackedLinear, weight: Tensor) -> PackedEmbedding | None:
        """None: this oneDNN packs in another way."""
        num_rows, in_features = weight.shape
        pair = 4 // weight.element_size()
        num_bytes = int(torch.ops.mkldnn._nbytes(linear.packed))
        num_blocks = -(-num_rows // cls._BLOCK_ROWS)
        if (
            in_features % pair
            or num_bytes != num_blocks * cls._BLOCK_ROWS * in_features * weight.element_size()
        ):
            return None
        address = int(torch.ops.mkldnn.data_ptr(linear.packed))
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))
        view = torch.from_numpy(memory).view(weight.dtype)
        found = cls(linear, view.view(num_blocks, in_features // pair, cls._BLOCK_ROWS, pair))
        ids = torch.arange(num_rows)
        same = all(torch.equal(found(part), weight[part]) for part in torch.split(ids, 4096))
        return found if same else None

    def __call__(self, token_ids: Tensor) -> Tensor:
        blocks = token_ids.div(self._BLOCK_ROWS, rounding_mode="floor")
        return self._view[blocks, :, token_ids % self._BLOCK_ROWS].flatten(1)
