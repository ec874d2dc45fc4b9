"""Pinned host memory in one piece, of any size.

PyTorch's own pinned allocations are rounded up to a power of two: 130 GiB would take 256.
"""

from __future__ import annotations

import mmap
import os
import weakref
from contextlib import suppress
from typing import Any

import torch

from kvrelay.core.errors import ConfigError


class PinnedMemory:
    """`bytes` ``[num_bytes]`` uint8, registered with CUDA until this object is gone: keep it beside views.

    Raises:
        ConfigError: the host has not so much, or CUDA may not pin it.
    """

    def __init__(self, num_bytes: int) -> None:
        host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if num_bytes > host_bytes:  # Pinning takes the pages: the kernel would end some process.
            raise ConfigError(f"{num_bytes} bytes of host memory can't be had: the host has {host_bytes}")
        try:
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"{num_bytes} bytes of host memory can't be had: {error}") from error
        memory.madvise(mmap.MADV_DONTFORK)  # or a write after a fork would go to a page that is not pinned
        with suppress(OSError):  # a kernel may be built without
            memory.madvise(mmap.MADV_HUGEPAGE)  # far fewer pages to pin
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)
        code = int(_cudart().cudaHostRegister(self.bytes.data_ptr(), num_bytes, 0))
        if code:
            raise ConfigError(
                f"{num_bytes} bytes of host memory can't be pinned (CUDA error {code}): give less, or raise"
                " the limits on memory and locked memory (ulimit -l) of this process"
            )
        weakref.finalize(self, _unregister, self.bytes.data_ptr()).atexit = False


def _unregister(address: int) -> None:
    torch.cuda.synchronize()  # copies may be under way
    _cudart().cudaHostUnregister(address)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
