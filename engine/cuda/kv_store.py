"""KV in GPU memory, for the transfer thread: one launch a message, on a stream of its own.

A cache ``[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]`` is seen as machine words,
``[2 * num_layers, num_slots, words_of_a_token]``; a block table becomes one list of slots, which goes up in
one pinned copy. Kernels that the engine has queued are waited for on the GPU, never on the CPU: the engine
calls `mark_written` before it reports KV as ready, and `mark_freed` before it gives blocks to a transfer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from kvrelay.core.errors import ConfigError
from kvrelay.core.ids import BlockId
from kvrelay.core.kv import DeviceKind, KVLayout, StagingMemory
from kvrelay.engine.cuda.copy_kernels import RowCopier, choose_copier
from kvrelay.engine.cuda.copy_stream import CopyStream, CudaCopyStream, InlineCopyStream, Mark

_WORDS: Final = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
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
        return DeviceKind.CUDA if self.bytes.is_cuda else DeviceKind.CPU

    @property
    def device_index(self) -> int:
        return self.bytes.device.index or 0

    def host_view(self) -> memoryview:
        assert self.device_kind is DeviceKind.CPU, "memory of a GPU has no view on the host"
        return self.bytes.numpy().data


class CudaKVStore:
    """`KVStore` over `cache` ``[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]``, shared.

    `gather`, `scatter` and `allocate_staging` belong to the transfer thread, `mark_written` and `mark_freed`
    to the engine's. On a CPU device the same arithmetic runs there, without streams.
    """

    def __init__(
        self,
        layout: KVLayout,
        cache: torch.Tensor,
        *,
        copier: RowCopier | None = None,
        stream: CopyStream | None = None,
    ) -> None:
        shape = (layout.num_layers, 2, layout.num_blocks, layout.block_size, layout.num_kv_heads)
        assert cache.shape == (*shape, layout.head_dim), f"{tuple(cache.shape)} does not fit {layout}"
        assert cache.element_size() == layout.dtype_bytes
        assert cache.is_contiguous()
        self._layout = layout
        self._device = cache.device
        self._num_slots = layout.num_blocks * layout.block_size
        self._token_bytes = layout.token_bytes_per_layer // 2
        self._cache = cache.detach().view(torch.uint8).view(2 * layout.num_layers, self._num_slots, -1)
        word = _widest_word(self._token_bytes)
        self._copier = copier or choose_copier(self._device, self._token_bytes // word.itemsize, word)
        is_cuda = self._device.type == "cuda"
        self._stream = stream or (CudaCopyStream(self._device) if is_cuda else InlineCopyStream())
        self._slots = _SlotList(self._device)
        self._written: list[Mark | None] = [None] * layout.num_layers
        self._freed: Mark | None = None

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def copier_name(self) -> str:
        """``triton`` or ``index_select``."""
        return self._copier.name

    def allocate_staging(self, num_bytes: int) -> CudaStaging:
        """Memory beside the cache; also makes the device current on the calling thread, as UCX needs it."""
        self._stream.adopt_thread()
        staging = CudaStaging(num_bytes, self._device)
        self._stream.settle()
        return staging

    def mark_written(self, layers: range | None = None) -> Mark | None:
        """From the engine's thread, before it reports KV of `layers` (all: None) as ready.

        Later gathers of these layers wait, on the GPU, for what the calling thread's current stream has
        queued so far; so can whoever has the mark that is returned. Not while a CUDA graph is captured: after
        its replay.
        """
        mark = self._stream.mark()
        for layer in layers if layers is not None else range(self._layout.num_layers):
            self._written[layer] = mark
        return mark

    def mark_freed(self) -> None:
        """From the engine's thread, before it gives a receive blocks that queued kernels may use.

        Later scatters wait, on the GPU, for what the calling thread's current stream has queued so far.
        """
        self._freed = self._stream.mark()

    def gather(
        self,
        block_table: Sequence[BlockId],
        layers: range,
        tokens: range,
        out: StagingMemory,
        out_offset_bytes: int,
    ) -> int:
        planes, message = self._views(out, out_offset_bytes, layers, tokens)
        marks = {self._written[layer] for layer in layers}
        with self._stream.copying(after=marks):
            slots = self._slots.upload(block_table, tokens, self._layout.block_size, self._num_slots)
            self._copier.gather(planes, slots, message)
        return message.numel() * message.element_size()

    def scatter(
        self,
        block_table: Sequence[BlockId],
        layers: range,
        tokens: range,
        source: StagingMemory,
        source_offset_bytes: int,
    ) -> int:
        planes, message = self._views(source, source_offset_bytes, layers, tokens)
        with self._stream.copying(after={self._freed}):
            slots = self._slots.upload(block_table, tokens, self._layout.block_size, self._num_slots)
            self._copier.scatter(planes, slots, message)
        return message.numel() * message.element_size()

    def _views(
        self, staging: StagingMemory, offset_bytes: int, layers: range, tokens: range
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Planes of the cache ``[n, num_slots, words]`` and the message ``[n, len(tokens), words]``."""
        assert isinstance(staging, CudaStaging), "staging comes from allocate_staging"
        assert layers.step == tokens.step == 1
        assert 0 <= layers.start < layers.stop <= self._layout.num_layers
        assert 0 <= tokens.start < tokens.stop
        num_planes = 2 * len(layers)
        num_bytes = num_planes * len(tokens) * self._token_bytes
        assert 0 <= offset_bytes <= staging.num_bytes - num_bytes
        word = _widest_word(self._token_bytes, offset_bytes, staging.address, self._cache.data_ptr())
        planes = self._cache[2 * layers.start : 2 * layers.stop].view(word)
        flat = staging.bytes[offset_bytes : offset_bytes + num_bytes]
        return planes, flat.view(word).view(num_planes, len(tokens), -1)


class _SlotList:
    """Slots of a token range on the device; the buffers grow and are reused, one call at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._grow(4096)

    def upload(
        self, block_table: Sequence[BlockId], tokens: range, block_size: int, num_slots: int
    ) -> torch.Tensor:
        """``[len(tokens)]`` int64 on the device, by one copy that the current stream orders."""
        if len(tokens) > len(self._pinned):
            self._grow(1 << (len(tokens) - 1).bit_length())
        first = tokens.start // block_size
        blocks = np.asarray(block_table[first : -(-tokens.stop // block_size)], dtype=np.int64)
        assert len(blocks) * block_size >= tokens.stop - first * block_size, (
            "the block table does not reach that far"
        )
        # A wrong id would be an illegal address in a kernel, which costs the process its GPU.
        assert blocks.min() >= 0, "no such block"
        assert blocks.max() < num_slots // block_size, "no such block"
        slots = (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)
        skip = tokens.start - first * block_size
        self._pinned_view[: len(tokens)] = slots[skip : skip + len(tokens)]
        on_device = self._on_device[: len(tokens)]
        on_device.copy_(self._pinned[: len(tokens)], non_blocking=True)
        return on_device

    def _grow(self, num_slots: int) -> None:
        is_cuda = self._device.type == "cuda"
        self._pinned = torch.zeros(num_slots, dtype=torch.int64, pin_memory=is_cuda)
        self._pinned_view = self._pinned.numpy()
        self._on_device = torch.zeros(num_slots, dtype=torch.int64, device=self._device)


def _widest_word(*multiples: int) -> torch.dtype:
    """The widest integer type that all these byte counts are multiples of."""
    return next(word for size, word in _WORDS if all(count % size == 0 for count in multiples))


def _require_plain_allocations() -> None:
    for name in _ALLOCATOR_SETTINGS:
        if "expandable_segments:true" in os.environ.get(name, "").lower().replace(" ", ""):
            raise ConfigError(f"{name} must not have expandable_segments: KV transfer would lose NVLink")
