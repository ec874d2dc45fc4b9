"""Pinned host memory in one piece, of any size.

PyTorch's own pinned allocations are rounded up to a power of two: 130 GiB would take 256.
"""

from __future__ import annotations

import mmap
import weakref

import torch

from kvrelay.core.errors import ConfigError


class PinnedMemory:
    """`bytes` ``[num_bytes]`` uint8, registered with CUDA until this object is gone: keep it beside every view.

    Raises:
        ConfigError: the host has not so much, or CUDA may not pin it.
    """

    def __init__(self, num_bytes: int) -> None:
        try:
            memory = mmap.mmap(-1, num_bytes)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"{num_bytes} bytes of host memory can't be had: {error}") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # pinned several times sooner
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)
        error = int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), num_bytes, 0))
        if error:
            raise ConfigError(
                f"{num_bytes} bytes of host memory can't be pinned (CUDA error {error}): give less, or raise"
                " the limits on memory and locked memory (ulimit -l) of this process"
            )
        weakref.finalize(self, _unregister, self.bytes.data_ptr()).atexit = False


def _unregister(address: int) -> None:
    torch.cuda.synchronize()  # copies may be under way
    torch.cuda.cudart().cudaHostUnregister(address)
