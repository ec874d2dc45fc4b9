"""Row operations of the CUDA engine."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrelay.engine.cuda.kernels import gate_kernel, next_power_of_two, rms_norm_kernel, rotate_kernel

_GATE_BLOCK = 1024
_ROTATED_HEADS = 8


class CudaRows:
    """See `kvrelay.engine.row_operations.RowOperations`."""

    def __init__(self, rms_norm_eps: float) -> None:
        self._epsilon = rms_norm_eps

    def rms_norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        size = weight.shape[0]
        flat = rows if rows.dim() == 2 and rows.stride(1) == 1 else rows.reshape(-1, size)
        result = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        block = next_power_of_two(size)
        warps = min(16, max(1, block // 256))
        rms_norm_kernel[(flat.shape[0],)](
            flat, weight, result, flat.stride(0), size, self._epsilon, BLOCK=block, num_warps=warps
        )
        return result

    def gate(self, gate_up: Tensor) -> Tensor:
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        result = gate_up.new_empty((num_rows, size))
        gate_kernel[(num_rows, -(-size // _GATE_BLOCK))](gate_up, result, size, BLOCK=_GATE_BLOCK)
        return result

    def rotate(self, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        num_rows, num_heads, head_dim = heads.shape
        assert heads.stride(1) == head_dim
        rotate_kernel[(num_rows, -(-num_heads // _ROTATED_HEADS))](
            heads,
            cosines,
            sines,
            heads.stride(0),
            num_heads,
            HALF=head_dim // 2,
            HALF_BLOCK=next_power_of_two(head_dim // 2),
            HEADS_BLOCK=_ROTATED_HEADS,
        )
        return heads
