"""Staging memory on a GPU."""

from __future__ import annotations

import os
from typing import Final

import torch

from kvrelay.core.errors import ConfigError
from kvrelay.core.kv import DeviceKind

_ALLOCATOR_SETTINGS: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


class CudaStaging:
    """`StagingMemory` on `device`, from plain ``cudaMalloc``, zeroed; on a CPU device host memory.

    Raises:
        ConfigError: PyTorch is set to ``expandable_segments``, whose memory other processes can't open, so
            that UCX would leave NVLink without a word.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        assert num_bytes > 0
        _require_plain_allocations()
        self.bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.num_bytes = num_bytes

    @property
    def address(self) -> int:
        return self.bytes.data_ptr()

    @property
    def device_kind(self) -> DeviceKind:
        return kind_of(self.bytes.device)

    @property
    def device_index(self) -> int:
        return self.bytes.device.index or 0

    def host_view(self) -> memoryview:
        assert self.device_kind is DeviceKind.CPU, "memory of a GPU has no view on the host"
        return self.bytes.numpy().data


def kind_of(device: torch.device) -> DeviceKind:
    """CPU for whatever is no CUDA device."""
    return DeviceKind.CUDA if device.type == "cuda" else DeviceKind.CPU


def _require_plain_allocations() -> None:
    for name in _ALLOCATOR_SETTINGS:
        if "expandable_segments:true" in os.environ.get(name, "").lower().replace(" ", ""):
            raise ConfigError(f"{name} must not have expandable_segments: KV transfer would lose NVLink")
