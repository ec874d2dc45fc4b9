"""Block tables on a device, uploaded once for all messages of a transfer."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import numpy as np
import torch

from kvrelay.core.ids import BlockId

_NUM_TABLES: Final = 32


class BlockTables:
    """Those used last, on one device; older ones are forgotten.

    All memory is taken at once: a pinned buffer made for an upload would cost more than the upload. Used by
    one thread, within the stream that the copies run on, which orders an upload before its use and the reuse
    of a forgotten table's memory behind its last one.
    """

    def __init__(self, device: torch.device, num_blocks: int) -> None:
        is_cuda = device.type == "cuda"
        self._num_blocks = num_blocks
        self._on_device = torch.zeros((_NUM_TABLES, num_blocks), dtype=torch.int64, device=device)
        self._on_host = torch.zeros((_NUM_TABLES, num_blocks), dtype=torch.int64, pin_memory=is_cuda)
        self._uploaded: list[torch.cuda.Event | None] = [None] * _NUM_TABLES
        if is_cuda:
            self._uploaded = [torch.cuda.Event() for _ in range(_NUM_TABLES)]  # type: ignore[no-untyped-call]
        self._place_of: OrderedDict[tuple[BlockId, ...], int] = OrderedDict()
        self._latest: tuple[tuple[BlockId, ...], torch.Tensor] | None = None

    def __contains__(self, block_table: tuple[BlockId, ...]) -> bool:
        return self._is_latest(block_table) or block_table in self._place_of

    def on_device(self, block_table: tuple[BlockId, ...]) -> torch.Tensor:
        """``[num_blocks]`` int64, of which the table fills the beginning; it may still be on its way."""
        if self._latest is None or self._latest[0] is not block_table:  # hashing a long one takes its time
            if block_table not in self._place_of:
                self.upload(block_table)
            self._place_of.move_to_end(block_table)
            self._latest = (block_table, self._on_device[self._place_of[block_table]])
        return self._latest[1]

    def upload(self, block_table: tuple[BlockId, ...]) -> None:
        """Bring a new one to the device, on the current stream."""
        place = self._free_place()
        self._copy(block_table, place)
        self._place_of[block_table] = place

    def _is_latest(self, block_table: tuple[BlockId, ...]) -> bool:
        return self._latest is not None and self._latest[0] is block_table

    def _free_place(self) -> int:
        if len(self._place_of) < _NUM_TABLES:
            return len(self._place_of)
        _, place = self._place_of.popitem(last=False)
        return place

    def _copy(self, block_table: tuple[BlockId, ...], place: int) -> None:
        blocks = np.asarray(block_table, dtype=np.int64)
        # A wrong id would be an illegal address in a kernel, which costs the process its GPU.
        assert blocks.min() >= 0, "no such block"
        assert blocks.max() < self._num_blocks, "no such block"
        uploaded = self._uploaded[place]
        if uploaded is not None:
            uploaded.synchronize()  # long over, as a rule
        self._on_host[place].numpy()[: len(blocks)] = blocks
        self._on_device[place, : len(blocks)].copy_(self._on_host[place, : len(blocks)], non_blocking=True)
        if uploaded is not None:
            uploaded.record(torch.cuda.current_stream())
