"""What carries KV blocks between the device's cache and the host tier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvrelay.engine.host_tier import BlockCopy


class BlockMover(Protocol):
    """Over one cache ``[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]``, or a shard of it
    with some of the heads, and its own host memory ``[num_slots, num_layers, 2, block_size, ...]``."""

    def move(self, copies: Sequence[BlockCopy]) -> None:
        """The copies take effect in their order, between what the calling thread has queued on the device
        and what it will queue."""
        ...


class CpuBlockMover:
    """The device is the host: plain copies. The host tier's pages are taken as they are first written."""

    def __init__(self, cache: Tensor, num_slots: int) -> None:
        self._blocks = cache.detach().permute(2, 0, 1, 3, 4, 5)
        self._host = torch.empty((num_slots, *self._blocks.shape[1:]), dtype=cache.dtype)

    @torch.inference_mode()
    def move(self, copies: Sequence[BlockCopy]) -> None:
        for block, slot, to_host in copies:
            if to_host:
                self._host[slot].copy_(self._blocks[block])
            else:
                self._blocks[block].copy_(self._host[slot])
