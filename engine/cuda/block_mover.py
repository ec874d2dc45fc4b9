"""KV blocks between GPU memory and pinned host memory, beside the engine's own work.

Blocks that leave are gathered on the engine's stream into a staging buffer, at the speed of HBM, and go to
the host from there on a stream of their own; blocks that come back arrive in a staging buffer on a third
stream and are scattered on the engine's. So the engine's stream waits for PCIe only for what it is about to
read, or when the staging buffers are all full; the host never waits. Both directions run at once.

A block is contiguous in host memory, ``[num_layers, 2, block_size, num_kv_heads, head_dim]``, and so it is in
the staging buffers: runs of adjacent slots are one copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import torch
from torch import Tensor

from kvrelay.core.errors import ConfigError
from kvrelay.engine.cuda.copy_queue import CopyQueue, CudaCopyQueue, InlineCopyQueue
from kvrelay.engine.cuda.copy_stream import Mark
from kvrelay.engine.cuda.pinned_memory import PinnedMemory
from kvrelay.engine.host_tier import BlockCopy

LOAD_BYTES: Final = 32 << 20
"""A load is what one staging buffer takes: long enough for PCIe, short enough to overlap its two halves."""
NUM_OUT_BUFFERS: Final = 8
NUM_IN_BUFFERS: Final = 4


class CopyQueues(NamedTuple):
    """`engine` is the one that computes; the others carry what crosses PCIe, each in one direction."""

    engine: CopyQueue
    to_host: CopyQueue
    to_device: CopyQueue


@dataclass(slots=True, eq=False)
class _Staging:
    """`blocks` ``[blocks_per_load, 2 * num_layers, row_words]``. `copied`: where its latest copy from or to
    the host is done; `emptied`: where it may be filled again."""

    blocks: Tensor
    copied: Mark | None = None
    emptied: Mark | None = None


class _Ring:
    """Staging buffers in turn."""

    def __init__(self, num_buffers: int, shape: tuple[int, ...], like: Tensor) -> None:
        self._buffers = [
            _Staging(torch.empty(shape, dtype=like.dtype, device=like.device)) for _ in range(num_buffers)
        ]
        self._num_taken = 0

    def next(self) -> _Staging:
        self._num_taken += 1
        return self._buffers[self._num_taken % len(self._buffers)]


class CudaBlockMover:
    """See `kvrelay.engine.block_mover.BlockMover`. On a CPU device the same arithmetic runs without streams.

    Raises:
        ConfigError: the host memory can't be pinned.
    """

    def __init__(
        self,
        cache: Tensor,
        num_slots: int,
        *,
        queues: CopyQueues | None = None,
        load_bytes: int = LOAD_BYTES,
    ) -> None:
        assert cache.is_contiguous()
        num_layers, _, num_blocks = cache.shape[:3]
        num_planes = 2 * num_layers
        row_bytes = cache[0, 0, 0].numel() * cache.element_size()
        word = torch.int64 if row_bytes % 8 == 0 else torch.uint8
        self._rows = cache.detach().view(num_planes * num_blocks, -1).view(torch.uint8).view(word)
        self._planes = torch.arange(num_planes, device=cache.device) * num_blocks
        self._num_blocks, self._num_slots = num_blocks, num_slots
        self._is_cuda = cache.is_cuda
        block_bytes = num_planes * row_bytes
        self._memory = _host_memory(num_slots * block_bytes, is_cuda=self._is_cuda)
        self._host = self._memory.bytes.view(word).view(num_slots, num_planes, -1)
        self._blocks_per_load = max(1, min(num_slots, load_bytes // block_bytes))
        shape = (self._blocks_per_load, *self._host.shape[1:])
        self._out = _Ring(NUM_OUT_BUFFERS, shape, self._rows)
        self._in = _Ring(NUM_IN_BUFFERS, shape, self._rows)
        self._filled_by: dict[int, _Staging] = {}
        self._queues = queues or _queues(cache.device)

    @torch.inference_mode()
    def move(self, copies: Sequence[BlockCopy]) -> None:
        # A wrong id would be an illegal address in a kernel, which costs the process its GPU.
        assert all(0 <= block < self._num_blocks for block, _, _ in copies), "no such block"
        assert all(0 <= slot < self._num_slots for _, slot, _ in copies), "no such slot"
        for load in _loads(copies, self._blocks_per_load):
            if load[0].to_host:
                self._copy_out(load)
            else:
                self._copy_in(load)

    def _copy_out(self, load: Sequence[BlockCopy]) -> None:
        """A slot is filled after its last content was read: the engine's stream has waited for that."""
        staging = self._out.next()
        gathered = self._queues.engine.enqueue(partial(self._gather, load, staging), [staging.emptied])
        staging.copied = staging.emptied = self._queues.to_host.enqueue(
            partial(self._store, load, staging), [gathered]
        )
        for copy in load:
            self._filled_by[copy.slot] = staging

    def _copy_in(self, load: Sequence[BlockCopy]) -> None:
        """A slot is read after it was filled. Its buffer may carry a later load by now, and then that is
        waited for: loads of one direction are done in order."""
        staging = self._in.next()
        fillers = {self._filled_by[copy.slot].copied for copy in load}
        staging.copied = self._queues.to_device.enqueue(
            partial(self._fetch, load, staging), [staging.emptied, *fillers]
        )
        staging.emptied = self._queues.engine.enqueue(partial(self._scatter, load, staging), [staging.copied])

    def _gather(self, load: Sequence[BlockCopy], staging: _Staging) -> None:
        torch.index_select(self._rows, 0, self._row_index(load), out=_rows_of(staging, len(load)))

    def _scatter(self, load: Sequence[BlockCopy], staging: _Staging) -> None:
        self._rows.index_copy_(0, self._row_index(load), _rows_of(staging, len(load)))

    def _store(self, load: Sequence[BlockCopy], staging: _Staging) -> None:
        for slot, index, num in _slot_runs(load):
            self._host[slot : slot + num].copy_(staging.blocks[index : index + num], non_blocking=True)

    def _fetch(self, load: Sequence[BlockCopy], staging: _Staging) -> None:
        for slot, index, num in _slot_runs(load):
            staging.blocks[index : index + num].copy_(self._host[slot : slot + num], non_blocking=True)

    def _row_index(self, load: Sequence[BlockCopy]) -> Tensor:
        """``[len(load) * 2 * num_layers]``: a block's rows of `_rows`, one block after the other."""
        # Pinned, or the copy would wait for the step that is under way.
        blocks = torch.tensor([copy.block for copy in load], pin_memory=self._is_cuda)
        on_device = blocks.to(self._planes.device, non_blocking=True)
        return (on_device[:, None] + self._planes).view(-1)


class _PlainMemory:
    def __init__(self, num_bytes: int) -> None:
        self.bytes = torch.empty(num_bytes, dtype=torch.uint8)


def _host_memory(num_bytes: int, *, is_cuda: bool) -> PinnedMemory | _PlainMemory:
    if not is_cuda:
        return _PlainMemory(num_bytes)
    try:
        return PinnedMemory(num_bytes)
    except ConfigError as error:
        raise ConfigError(f"host_kv_bytes: {error.message}") from error


def _queues(device: torch.device) -> CopyQueues:
    if device.type != "cuda":
        return CopyQueues(InlineCopyQueue(), InlineCopyQueue(), InlineCopyQueue())
    return CopyQueues(
        CudaCopyQueue(device, is_current=True),
        CudaCopyQueue(device, is_current=False),
        CudaCopyQueue(device, is_current=False),
    )


def _rows_of(staging: _Staging, num_blocks: int) -> Tensor:
    return staging.blocks[:num_blocks].flatten(0, 1)


def _loads(copies: Sequence[BlockCopy], blocks_per_load: int) -> Iterator[list[BlockCopy]]:
    """Copies of one direction and of different blocks, in order, as many as a staging buffer takes."""
    load: list[BlockCopy] = []
    blocks: set[int] = set()
    for copy in copies:
        is_full = len(load) == blocks_per_load or copy.block in blocks
        if load and (is_full or copy.to_host is not load[0].to_host):
            yield load
            load, blocks = [], set()
        load.append(copy)
        blocks.add(copy.block)
    if load:
        yield load


def _slot_runs(load: Sequence[BlockCopy]) -> Iterator[tuple[int, int, int]]:
    """Runs of adjacent slots: (first slot, index of its copy in the load, length)."""
    start = 0
    for end in range(1, len(load) + 1):
        if end == len(load) or load[end].slot != load[end - 1].slot + 1:
            yield load[start].slot, start, end - start
            start = end
