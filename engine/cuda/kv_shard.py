"""One GPU's share of a node's KV cache, some of the heads, and the copies between it and messages."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Final

import torch

from kvrelay.core.ids import BlockId
from kvrelay.core.kv import KVLayout
from kvrelay.engine.cuda.block_tables import BlockTables
from kvrelay.engine.cuda.copy_kernels import (
    POINTER_ALIGNMENT,
    RawCopy,
    RowCopier,
    RowShape,
    TokenRows,
    TritonCopier,
    choose_copier,
)
from kvrelay.engine.cuda.copy_stream import CopyEnd, CopyStream, Mark
from kvrelay.engine.cuda.staging import CudaStaging

_WORDS: Final = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


class KVShard:
    """`cache` ``[num_layers, 2, num_blocks, block_size, num_kv_heads / num_shards, head_dim]``, shared.

    A row of a message has the heads of all shards; this one's stand at ``index / num_shards`` of it.
    `layout` is the whole node's.
    """

    def __init__(
        self,
        layout: KVLayout,
        cache: torch.Tensor,
        index: int,
        num_shards: int,
        stream: CopyStream,
        copier: RowCopier | None,
    ) -> None:
        num_heads = layout.num_kv_heads // num_shards
        shape = (layout.num_layers, 2, layout.num_blocks, layout.block_size, num_heads, layout.head_dim)
        assert cache.shape == shape, f"{tuple(cache.shape)} is not shard {index} of {num_shards} of {layout}"
        assert cache.element_size() == layout.dtype_bytes
        assert cache.is_contiguous()
        self.device = cache.device
        self.stream = stream
        self._layout = layout
        self._index = index
        self._num_shards = num_shards
        self._row_bytes = num_heads * layout.head_dim * layout.dtype_bytes
        self._num_slots = layout.num_blocks * layout.block_size
        self._plane_bytes = self._num_slots * self._row_bytes
        self._address = cache.data_ptr()
        self._cache = cache.detach().view(torch.uint8).view(2 * layout.num_layers, self._num_slots, -1)
        self._tables = BlockTables(cache.device, layout.num_blocks)
        word = _widest_word(self._row_bytes)
        words = self._row_bytes // word.itemsize
        self._row_shape = RowShape(words, words * num_shards, word, layout.block_size)
        self.copier = copier or choose_copier(cache.device, self._row_shape)
        # Rows of whole 8-byte words, all of which begin at multiples of what the kernel is compiled for.
        is_aligned = self._row_bytes % POINTER_ALIGNMENT == 0
        self._launches = cache.is_cuda and isinstance(self.copier, TritonCopier) and is_aligned

    def copy(
        self,
        block_table: tuple[BlockId, ...],
        layers: range,
        tokens: range,
        staging: CudaStaging,
        offset_bytes: int,
        after: Sequence[Mark],
        *,
        is_gather: bool,
    ) -> CopyEnd:
        """Queue the copy of this shard's part into the message, or out of it."""
        if self._launches:
            raw = self._raw(layers, tokens, staging.address + offset_bytes, is_gather)
            if raw is not None:
                return self._launch(raw, block_table, after)
        planes, message = self._views(staging, offset_bytes, layers, tokens)
        move = self.copier.gather if is_gather else self.copier.scatter
        return self.stream.run(lambda: move(planes, self._rows(block_table, tokens), message), after)

    def _raw(self, layers: range, tokens: range, message: int, is_gather: bool) -> RawCopy | None:
        """None: an address is odd."""
        planes = self._address + 2 * layers.start * self._plane_bytes
        message += self._index * self._row_bytes
        if (planes | message) % POINTER_ALIGNMENT:
            return None
        return RawCopy(
            planes, message, 2 * len(layers), len(tokens), self._num_slots, tokens.start, is_gather
        )

    def _launch(self, raw: RawCopy, block_table: tuple[BlockId, ...], after: Sequence[Mark]) -> CopyEnd:
        assert isinstance(self.copier, TritonCopier)
        copier = self.copier
        if block_table not in self._tables:
            self.stream.run(lambda: self._tables.upload(block_table), ())
        table = self._tables.on_device(block_table)
        is_here = torch.cuda.current_device() == self.device.index
        with nullcontext() if is_here else torch.cuda.device(self.device):
            return self.stream.launch(partial(copier.launch, raw, self._row_shape, table), after)

    def _rows(self, block_table: tuple[BlockId, ...], tokens: range) -> TokenRows:
        return TokenRows(self._tables.on_device(block_table), self._layout.block_size, tokens.start)

    def _views(
        self, staging: CudaStaging, offset_bytes: int, layers: range, tokens: range
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Planes of the cache ``[n, num_slots, words]`` and this shard's part of the message."""
        word = _widest_word(self._row_bytes, offset_bytes, staging.address, self._cache.data_ptr())
        planes = self._cache[2 * layers.start : 2 * layers.stop].view(word)
        num_bytes = len(planes) * len(tokens) * self._row_bytes * self._num_shards
        flat = staging.bytes[offset_bytes : offset_bytes + num_bytes].view(word)
        message = flat.view(len(planes), len(tokens), -1)
        words = planes.shape[2]
        return planes, message[:, :, self._index * words : (self._index + 1) * words]


def _widest_word(*multiples: int) -> torch.dtype:
    """The widest integer type that all these byte counts are multiples of."""
    return next(word for size, word in _WORDS if all(count % size == 0 for count in multiples))
