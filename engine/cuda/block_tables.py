"""Block tables on a device, uploaded once for all messages of a transfer."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import numpy as np
import torch

from kvrelay.core.ids import BlockId

_MAX_TABLES: Final = 32


class BlockTables:
    """Those used last, on one device; older ones are forgotten.

    Used within the stream that the copies run on, which orders an upload before its use and the reuse of
    the memory of a forgotten table behind it.
    """

    def __init__(self, device: torch.device, num_blocks: int) -> None:
        self._device = device
        self._num_blocks = num_blocks
        self._tables: OrderedDict[tuple[BlockId, ...], torch.Tensor] = OrderedDict()

    def on_device(self, block_table: tuple[BlockId, ...]) -> torch.Tensor:
        """``[len(block_table)]`` int64; it may still be on its way there."""
        found = self._tables.get(block_table)
        if found is None:
            found = self._tables[block_table] = self._upload(block_table)
            if len(self._tables) > _MAX_TABLES:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(block_table)
        return found

    def _upload(self, block_table: tuple[BlockId, ...]) -> torch.Tensor:
        blocks = np.asarray(block_table, dtype=np.int64)
        # A wrong id would be an illegal address in a kernel, which costs the process its GPU.
        assert blocks.min() >= 0, "no such block"
        assert blocks.max() < self._num_blocks, "no such block"
        table = torch.from_numpy(blocks)
        if self._device.type != "cuda":
            return table
        return table.pin_memory().to(self._device, non_blocking=True)
