"""KV in host memory, for the transfer thread: numpy only, so that no torch thread pool wakes.

A cache ``[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]`` is seen as bytes,
``[num_layers, 2, num_slots, token_bytes]``; a block table is cut into its contiguous runs and each run is
one strided copy. The copies release the interpreter lock.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.ids import BlockId
from kvrelay.core.kv import DeviceKind, FinishedCopy, KVLayout, StagingMemory

UInt8s: TypeAlias = NDArray[np.uint8]


class HostStaging:
    """Page-aligned anonymous memory; `StagingMemory` on the CPU."""

    def __init__(self, num_bytes: int) -> None:
        assert num_bytes > 0
        self._memory = mmap.mmap(-1, num_bytes)
        self._address = int(np.frombuffer(self._memory, dtype=np.uint8).ctypes.data)
        self.num_bytes = num_bytes

    @property
    def address(self) -> int:
        return self._address

    @property
    def device_kind(self) -> DeviceKind:
        return DeviceKind.CPU

    @property
    def device_index(self) -> int:
        return 0

    def host_view(self) -> memoryview:
        return memoryview(self._memory)


class HostKVStore:
    """`KVStore` over `cache_bytes` ``[num_layers, 2, num_slots, token_bytes]``, shared, not copied.

    A copy is done when it returns.
    """

    device_kind: Final = DeviceKind.CPU

    def __init__(self, layout: KVLayout, cache_bytes: UInt8s) -> None:
        num_slots = layout.num_blocks * layout.block_size
        self._token_bytes = layout.token_bytes_per_layer // 2
        assert cache_bytes.shape == (layout.num_layers, 2, num_slots, self._token_bytes)
        self._cache = cache_bytes
        self._layout = layout

    @property
    def layout(self) -> KVLayout:
        return self._layout

    def allocate_staging(self, num_bytes: int) -> HostStaging:
        return HostStaging(num_bytes)

    def gather(
        self,
        block_table: Sequence[BlockId],
        layers: range,
        tokens: range,
        out: StagingMemory,
        out_offset_bytes: int,
    ) -> FinishedCopy:
        message = self._message_view(out, out_offset_bytes, layers, tokens)
        cache = self._cache[layers.start : layers.stop]
        for slot, offset, num in slot_runs(block_table, tokens, self._layout.block_size):
            message[:, :, offset : offset + num] = cache[:, :, slot : slot + num]
        return FinishedCopy(message.nbytes)

    def scatter(
        self,
        block_table: Sequence[BlockId],
        layers: range,
        tokens: range,
        source: StagingMemory,
        source_offset_bytes: int,
    ) -> FinishedCopy:
        message = self._message_view(source, source_offset_bytes, layers, tokens)
        cache = self._cache[layers.start : layers.stop]
        for slot, offset, num in slot_runs(block_table, tokens, self._layout.block_size):
            cache[:, :, slot : slot + num] = message[:, :, offset : offset + num]
        return FinishedCopy(message.nbytes)

    def _message_view(
        self, staging: StagingMemory, offset_bytes: int, layers: range, tokens: range
    ) -> UInt8s:
        assert layers.step == tokens.step == 1
        assert 0 <= layers.start < layers.stop <= self._layout.num_layers
        assert 0 <= tokens.start < tokens.stop
        shape = (len(layers), 2, len(tokens), self._token_bytes)
        num_bytes = len(layers) * 2 * len(tokens) * self._token_bytes
        assert 0 <= offset_bytes <= staging.num_bytes - num_bytes
        flat = np.frombuffer(staging.host_view(), dtype=np.uint8, count=num_bytes, offset=offset_bytes)
        return flat.reshape(shape)


def slot_runs(
    block_table: Sequence[BlockId], tokens: range, block_size: int
) -> Iterator[tuple[int, int, int]]:
    """Contiguous runs of slots that hold `tokens`: (first slot, offset from ``tokens.start``, length)."""
    assert tokens.stop <= len(block_table) * block_size, "the block table does not reach that far"
    position = tokens.start
    while position < tokens.stop:
        index, within = divmod(position, block_size)
        last = index
        while (last + 1) * block_size < tokens.stop and block_table[last + 1] == block_table[last] + 1:
            last += 1
        stop = min((last + 1) * block_size, tokens.stop)
        yield block_table[index] * block_size + within, position - tokens.start, stop - position
        position = stop
