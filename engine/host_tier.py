"""The host tier of the prefix cache: which evicted blocks host memory holds, and what must be copied for it.

A block that the pool evicts goes to a slot of host memory; when a later prompt has that prefix it comes back
into a fresh block. The host copy stays then, because the next eviction of the block costs nothing as long as
it is there, but it is the first to give way: what is on the device as well is no loss. All else leaves least
recently evicted first, which drops the end of a prefix before its beginning, as the pool evicts it.

Nothing is copied here: `take_copies` gives the copies in the order in which they have to take effect. That
order alone makes them right: a block is copied out before something is copied into it, and a slot is copied
in before its next content comes.

Pure bookkeeping: no KV bytes here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvrelay.core.block_hash import BlockHash
from kvrelay.core.errors import ConfigError
from kvrelay.core.ids import BlockId
from kvrelay.engine.change_log import ChangeLog


class BlockCopy(NamedTuple):
    """All layers of one block, from the device's `block` to the host's `slot`, or back."""

    block: BlockId
    slot: int
    to_host: bool


def num_host_blocks(host_kv_bytes: int, block_bytes: int) -> int:
    """Slots of a tier of that size; 0: there is none.

    Raises:
        ConfigError: it would hold no block.
    """
    if 0 < host_kv_bytes < block_bytes:
        raise ConfigError(f"host_kv_bytes {host_kv_bytes} hold no KV block of {block_bytes} bytes")
    return host_kv_bytes // block_bytes


class HostTier:
    """Slots ``0 <= slot < num_slots``, all empty at first."""

    def __init__(self, num_slots: int) -> None:
        assert num_slots > 0
        self.num_slots = num_slots
        self.change_log = ChangeLog()
        self._slot_of: dict[BlockHash, int] = {}
        self._leaving_order: OrderedDict[BlockHash, None] = OrderedDict()
        self._empty = list(range(num_slots - 1, -1, -1))
        self._copies: list[BlockCopy] = []

    @property
    def num_used(self) -> int:
        return len(self._slot_of)

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._slot_of

    def hashes(self) -> Iterable[BlockHash]:
        """Of all blocks that it holds."""
        return self._slot_of.keys()

    def save(self, block: BlockId, block_hash: BlockHash) -> None:
        """`block`, which holds `block_hash`, is being evicted. It is lost if every slot is held."""
        if block_hash in self._slot_of:
            self._leaving_order.move_to_end(block_hash)
            return
        slot = self._take_slot()
        if slot is None:
            return
        self._slot_of[block_hash] = slot
        self.change_log.note(block_hash, is_held=True)
        self._leaving_order[block_hash] = None
        self._copies.append(BlockCopy(block, slot, to_host=True))

    def hold(self, hashes: Sequence[BlockHash]) -> None:
        """Keep these from leaving until each is restored."""
        for block_hash in hashes:
            del self._leaving_order[block_hash]

    def restore(self, block_hash: BlockHash, block: BlockId) -> None:
        """Bring what was held back into `block`. A prefix is restored from its beginning on."""
        assert block_hash not in self._leaving_order, "only what is held can be restored"
        self._leaving_order[block_hash] = None
        self._leaving_order.move_to_end(block_hash, last=False)
        self._copies.append(BlockCopy(block, self._slot_of[block_hash], to_host=False))

    def take_copies(self) -> list[BlockCopy]:
        """The copies since the last call; they are the caller's to execute, in this order, before anything
        else reads or writes one of their blocks."""
        copies, self._copies = self._copies, []
        return copies

    def check(self) -> None:
        """Assert every invariant; O(num_slots), for tests. Nothing is held between the pool's calls."""
        assert sorted([*self._slot_of.values(), *self._empty]) == list(range(self.num_slots))
        assert self._leaving_order.keys() == self._slot_of.keys()
        assert all(0 <= copy.slot < self.num_slots for copy in self._copies)

    def _take_slot(self) -> int | None:
        if self._empty:
            return self._empty.pop()
        if not self._leaving_order:
            return None
        leaving, _ = self._leaving_order.popitem(last=False)
        self.change_log.note(leaving, is_held=False)
        return self._slot_of.pop(leaving)
