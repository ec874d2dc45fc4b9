"""Row operations over kernels of our own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvrelay.engine.compiled.dtypes import kernel_dtype, row_stride
from kvrelay.engine.compiled.kernel import Kernel
from kvrelay.engine.compiled.openmp import OpenMP
from kvrelay.engine.compiled.row_kernels import gate_kernel, rms_norm_kernel, rotate_kernel
from kvrelay.engine.row_operations import norm_heads_apart


class CompiledRows:
    """See `kvrelay.engine.row_operations.RowOperations`."""

    def __init__(self, openmp: OpenMP, dtype: torch.dtype, head_dim: int, rms_norm_eps: float) -> None:
        kernel_type, name = kernel_dtype(dtype)
        self._epsilon = np.array([rms_norm_eps], dtype=np.float32)
        self._epsilon_address: int = self._epsilon.ctypes.data
        self._rms_norm = Kernel(openmp, rms_norm_kernel(kernel_type), name)
        self._gate = Kernel(openmp, gate_kernel(kernel_type), name)
        self._rotate = Kernel(openmp, rotate_kernel(kernel_type, head_dim), f"{name}-{head_dim}")

    def rms_norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        rows = rows.contiguous()
        result = torch.empty_like(rows)
        size = len(weight)
        self._rms_norm(
            rows.numel(),
            rows.numel() // size,
            size,
            rows.data_ptr(),
            weight.data_ptr(),
            result.data_ptr(),
            self._epsilon_address,
        )
        return result

    def norm_heads(self, heads: Tensor, num_queries: int, query_norm: Tensor, key_norm: Tensor) -> Tensor:
        return norm_heads_apart(self, heads, num_queries, query_norm, key_norm)

    def gate(self, gate_up: Tensor) -> Tensor:
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        result = gate_up.new_empty((num_rows, size))
        self._gate(gate_up.numel(), num_rows, size, gate_up.data_ptr(), result.data_ptr())
        return result

    def rotate(self, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        num_rows, num_heads, _ = heads.shape
        self._rotate(
            heads.numel(),
            num_rows,
            num_heads,
            row_stride(heads),
            heads.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
        )
        return heads
