"""Host memory that rank 0 shares with a follower: anonymous, and not bounded by the size of /dev/shm."""

from __future__ import annotations

import mmap
import os
from multiprocessing import reduction
from typing import Any

import torch
from torch import Tensor

from kvrelay.core.errors import ConfigError


class SharedHostMemory:
    """Zeros. Goes to a process that is being spawned as one of its arguments.

    Raises:
        ConfigError: this system has no anonymous files (it is not Linux), or no memory left.
    """

    def __init__(self, num_bytes: int) -> None:
        try:
            self._descriptor = os.memfd_create("kvrelay-kv")
            os.ftruncate(self._descriptor, num_bytes)
        except (AttributeError, OSError) as error:
            raise ConfigError(
                f"tensor_parallel_size above 1 on the CPU needs Linux's memfd: {error}"
            ) from error
        self._num_bytes = num_bytes
        self._map()

    @property
    def bytes(self) -> Tensor:
        """``[num_bytes]`` uint8."""
        return torch.frombuffer(self._memory, dtype=torch.uint8)

    def __getstate__(self) -> tuple[Any, int]:
        return reduction.DupFd(self._descriptor), self._num_bytes

    def __setstate__(self, state: tuple[Any, int]) -> None:
        descriptor, self._num_bytes = state
        self._descriptor = descriptor.detach()
        self._map()

    def _map(self) -> None:
        self._memory = mmap.mmap(self._descriptor, self._num_bytes)
        # The mapping keeps the memory; the descriptor is needed until every follower has been started.

    def close_descriptor(self) -> None:
        """Nobody else is to have this memory."""
        os.close(self._descriptor)
