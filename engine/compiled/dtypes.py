"""How kernels see torch's tensors."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from kvrelay.engine.compiled.arithmetic import DType

_DTYPES: Final[dict[torch.dtype, tuple[DType, str]]] = {
    torch.float32: (np.float32, "float32"),
    torch.bfloat16: (np.uint16, "bfloat16"),
}


def kernel_dtype(dtype: torch.dtype) -> tuple[DType, str]:
    """What its elements are in a kernel, and its name."""
    return _DTYPES[dtype]


def row_stride(rows: Tensor) -> int:
    """Elements from one row ``[num_heads, head_dim]`` to the next; each row's own lie side by side."""
    assert rows.stride(2) == 1
    assert rows.stride(1) == rows.shape[2] or rows.shape[1] == 1
    return rows.stride(0)
