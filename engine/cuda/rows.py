"""Row operations of the CUDA engine."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrelay.engine.cuda.compiled_launch import CompiledLaunch
from kvrelay.engine.cuda.kernels import next_power_of_two
from kvrelay.engine.cuda.row_kernels import gate_kernel, norm_heads_kernel, rms_norm_kernel, rotate_kernel

_GATE_BLOCK = 1024
_HEADS_AT_ONCE = 8


class CudaRows:
    """See `kvrelay.engine.row_operations.RowOperations`."""

    def __init__(self, rms_norm_eps: float) -> None:
        self._epsilon = rms_norm_eps
        self._launch_rms_norm = CompiledLaunch(rms_norm_kernel)
        self._launch_norm_heads = CompiledLaunch(norm_heads_kernel)
        self._launch_gate = CompiledLaunch(gate_kernel)
        self._launch_rotate = CompiledLaunch(rotate_kernel)

    def rms_norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        size = weight.shape[0]
        flat = rows if rows.dim() == 2 and rows.stride(1) == 1 else rows.reshape(-1, size)
        result = torch.empty_like(flat, memory_format=torch.contiguous_format)
        block = next_power_of_two(size)
        self._launch_rms_norm(
            (flat.shape[0], 1, 1),
            (flat, weight, result),
            (flat.stride(0), size, self._epsilon, block),
            num_warps=min(16, max(1, block // 256)),
        )
        return result if flat is rows else result.view(rows.shape)

    def norm_heads(self, heads: Tensor, num_queries: int, query_norm: Tensor, key_norm: Tensor) -> Tensor:
        """In place, so that queries and keys still lie beside their values."""
        num_rows, num_heads, head_dim = heads.shape
        assert heads.stride(1) == head_dim
        self._launch_norm_heads(
            (num_rows, -(-num_heads // _HEADS_AT_ONCE), 1),
            (heads, query_norm, key_norm),
            (
                heads.stride(0),
                num_queries,
                num_heads,
                head_dim,
                self._epsilon,
                _HEADS_AT_ONCE,
                next_power_of_two(head_dim),
            ),
        )
        return heads

    def gate(self, gate_up: Tensor) -> Tensor:
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        result = gate_up.new_empty((num_rows, size))
        self._launch_gate((num_rows, -(-size // _GATE_BLOCK), 1), (gate_up, result), (size, _GATE_BLOCK))
        return result

    def rotate(self, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        num_rows, num_heads, head_dim = heads.shape
        assert heads.stride(1) == head_dim
        half = head_dim // 2
        self._launch_rotate(
            (num_rows, -(-num_heads // _HEADS_AT_ONCE), 1),
            (heads, cosines, sines),
            (heads.stride(0), num_heads, half, next_power_of_two(half), _HEADS_AT_ONCE),
        )
        return heads
