"""Which nodes hold which KV blocks: the first 8 bytes of a chained block hash -> nodes, by tier.

The index is a hint: it tells blocks apart by 60 bits of their hash, may lag behind the nodes, and forgets
what was stored longest ago when it is full. A node looks into its own cache under the whole hash, so a wrong
hint costs time and never gives a wrong answer.

A block's holders are a set that all blocks with the same holders share: a bit mask in a `_HolderSet`. A
chain is mostly held as a whole, so a run of its keys costs one computation of sets, and a lost node is struck
from the sets, not from the keys. The keys stand in many small tables: no table takes longer than a moment to
grow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from sys import getsizeof
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.kv_events import Tier

BlockKeys = Sequence[int] | NDArray[np.uint64]
"""Keys of blocks, each ``0 <= key < 2**64``."""

_KEY_MASK: Final = (1 << 60) - 1
"""Python holds integers below 2**60 in 32 bytes, larger ones in 48."""
_KEY_BYTES: Final = 32
_SET_BYTES: Final = 160
"""Of a holder set without its mask: the object, and its place among the sets."""
_KEYS_PER_TABLE: Final = 20_000
_EVICTED_SHARE: Final = 64
_FEW_NODES: Final = 12
"""Up to so many bits of a mask are quicker read one by one than all by an array."""


@dataclass(frozen=True, slots=True, eq=False)
class PrefixMatch:
    """How many leading blocks of one chain each node holds, ``int32[max_nodes]`` by node: `device` counts
    those on its device, `either` those in its host tier as well. Read only; both may be one array."""

    device: NDArray[np.int32]
    either: NDArray[np.int32]


class _HolderSet:
    """The holders of `num_keys` blocks; bit ``node`` of `mask` means the device, ``max_nodes + node`` the
    host tier."""

    __slots__ = ("mask", "num_keys")

    def __init__(self, mask: int) -> None:
        self.mask = mask
        self.num_keys = 0


class BlockIndex:
    """At most `max_entries` entries, one for each block, node and tier. A node is a small integer,
    ``0 <= node < max_nodes``, that the caller gives."""

    def __init__(self, max_entries: int, max_nodes: int = 1024) -> None:
        assert max_entries > 0
        assert max_nodes > 0
        self.max_entries = max_entries
        self.max_nodes = max_nodes
        self.num_entries = 0
        """A block that n nodes hold counts n times."""
        self.num_evicted = 0
        """Entries dropped because of the bound."""
        num_tables = 1 << max(0, (max_entries // _KEYS_PER_TABLE).bit_length() - 1)
        self._tables: list[dict[int, _HolderSet]] = [{} for _ in range(num_tables)]
        self._table_mask = num_tables - 1
        self._next_table = 0
        self._num_keys = 0
        self._num_dead_keys = 0
        self._sets: dict[int, _HolderSet] = {}
        self._twins: set[_HolderSet] = set()
        """Sets that came to equal another one, or nothing, when a node was struck from them."""
        self._absent = _HolderSet(0)
        self._has_host_tier = False

    @property
    def num_bytes(self) -> int:
        """About how much memory it takes."""
        tables = sum(getsizeof(table) for table in self._tables)
        num_sets = len(self._sets) + len(self._twins)
        mask_bytes = self.max_nodes * (2 if self._has_host_tier else 1) // 8
        return tables + self._num_keys * _KEY_BYTES + num_sets * (_SET_BYTES + mask_bytes)

    # ---- what nodes hold ---------------------------------------------------------------------------

    def store(self, node: int, keys: BlockKeys, tier: Tier = Tier.DEVICE) -> None:
        """`node` holds these blocks in `tier`. What was stored longest ago is dropped, by all its holders,
        where there are more than `max_entries` now."""
        bit = self._bit(node, tier)
        self._has_host_tier |= tier is Tier.HOST
        tables, table_mask, absent = self._tables, self._table_mask, self._absent
        old: _HolderSet | None = None
        new, num_moved = absent, 0
        for key in _small_keys(keys):
            table = tables[key & table_mask]
            found = table.pop(key, absent)  # so that it becomes its table's youngest
            if found is not old:
                if old is not None:
                    self._move(old, new, num_moved)
                old, new, num_moved = found, self._set_of(found.mask | bit), 0
            table[key] = new
            num_moved += 1
        if old is not None:
            self._move(old, new, num_moved)
        self._make_room()

    def remove(self, node: int, keys: BlockKeys, tier: Tier = Tier.DEVICE) -> None:
        """`node` no longer holds these blocks in `tier`, if it did."""
        others = ~self._bit(node, tier)
        tables, table_mask, absent = self._tables, self._table_mask, self._absent
        old: _HolderSet | None = None
        new, num_moved = absent, 0
        for key in _small_keys(keys):
            table = tables[key & table_mask]
            found = table.get(key)
            if found is None:
                continue
            if found is not old:
                if old is not None:
                    self._move(old, new, num_moved)
                mask = found.mask & others
                old, new, num_moved = found, self._set_of(mask) if mask else absent, 0
            if new is absent:
                del table[key]
            else:
                table[key] = new
            num_moved += 1
        if old is not None:
            self._move(old, new, num_moved)

    def clear(self, node: int) -> None:
        """`node` holds nothing any more, in any tier."""
        bits = self._bit(node, Tier.DEVICE) | self._bit(node, Tier.HOST)
        for holders in [*self._sets.values(), *self._twins]:
            if struck := holders.mask & bits:
                self.num_entries -= holders.num_keys * struck.bit_count()
                self._replace_mask(holders, holders.mask ^ struck)

    # ---- what is asked -----------------------------------------------------------------------------

    def match_prefix(self, keys: BlockKeys) -> PrefixMatch:
        """How many blocks of the chain `keys`, first to last, each node holds without a gap."""
        tables, table_mask, absent = self._tables, self._table_mask, self._absent
        holding = (1 << self._num_bits()) - 1
        ends: list[tuple[int, int]] = []
        last: _HolderSet | None = None
        small_keys = _small_keys(keys)
        for depth, key in enumerate(small_keys):
            holders = tables[key & table_mask].get(key, absent)
            if holders is last:
                continue
            last = holders
            still_holding = holding & self._reach(holders.mask)
            if still_holding != holding:
                ends.append((holding ^ still_holding, depth))
                holding = still_holding
                if not holding:
                    break
        ends.append((holding, len(small_keys)))
        counts = self._counts(ends)
        return PrefixMatch(counts[: self.max_nodes], counts[-self.max_nodes :])

    def _num_bits(self) -> int:
        return self.max_nodes * (2 if self._has_host_tier else 1)

    def _reach(self, mask: int) -> int:
        """A set's mask with the upper half meaning either tier; there is no such half without host tiers."""
        if not self._has_host_tier:
            return mask
        return mask | ((mask & ((1 << self.max_nodes) - 1)) << self.max_nodes)

    def _counts(self, ends: Iterable[tuple[int, int]]) -> NDArray[np.int32]:
        """By bit, the depth beside which it stands in `ends`, which are pairs of a mask and a depth."""
        num_bits = self._num_bits()
        counts = np.zeros(num_bits, np.int32)
        places: list[int] = []
        depths: list[int] = []
        for mask, depth in ends:
            if not depth:
                continue
            if mask.bit_count() > _FEW_NODES:
                packed = np.frombuffer(mask.to_bytes(-(-num_bits // 8), "little"), np.uint8)
                unpacked = np.unpackbits(packed, count=num_bits, bitorder="little")
                counts[unpacked.view(np.bool_)] = depth
                continue
            while mask:
                place = mask.bit_length() - 1
                places.append(place)
                depths.append(depth)
                mask ^= 1 << place
        counts[places] = depths
        return counts

    # ---- sets of holders ---------------------------------------------------------------------------

    def _bit(self, node: int, tier: Tier) -> int:
        assert 0 <= node < self.max_nodes, f"node {node} of {self.max_nodes}"
        return 1 << (node if tier is Tier.DEVICE else self.max_nodes + node)

    def _set_of(self, mask: int) -> _HolderSet:
        holders = self._sets.get(mask)
        if holders is None:
            holders = self._sets[mask] = _HolderSet(mask)
        return holders

    def _move(self, old: _HolderSet, new: _HolderSet, num_keys: int) -> None:
        """So many keys went from one set to another; `_absent` stands for not being in a table."""
        if old is new:
            return
        self.num_entries += num_keys * (new.mask.bit_count() - old.mask.bit_count())
        if new is self._absent:
            self._num_keys -= num_keys
        else:
            new.num_keys += num_keys
        if old is self._absent:
            self._num_keys += num_keys
            return
        if not old.mask:
            self._num_dead_keys -= num_keys
        old.num_keys -= num_keys
        if not old.num_keys:
            self._forget(old)

    def _forget(self, holders: _HolderSet) -> None:
        if self._sets.get(holders.mask) is holders:
            del self._sets[holders.mask]
        else:
            self._twins.discard(holders)

    def _replace_mask(self, holders: _HolderSet, mask: int) -> None:
        self._forget(holders)
        holders.mask = mask
        if not mask:
            self._num_dead_keys += holders.num_keys
        if not mask or mask in self._sets:
            self._twins.add(holders)
        else:
            self._sets[mask] = holders

    # ---- the bound ---------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Go round the tables; from each drop what nobody holds any more, and then its oldest keys."""
        while self._is_overfull():
            table = self._tables[self._next_table]
            self._next_table = (self._next_table + 1) & self._table_mask
            if self._num_dead_keys:
                self._drop(table, [key for key, holders in table.items() if not holders.mask])
            if self._is_overfull():
                num_before = self.num_entries
                self._drop(table, list(islice(table, -(-len(table) // _EVICTED_SHARE))))
                self.num_evicted += num_before - self.num_entries

    def _is_overfull(self) -> bool:
        return max(self.num_entries, self._num_keys) > self.max_entries

    def _drop(self, table: dict[int, _HolderSet], keys: Iterable[int]) -> None:
        for key in keys:
            self._move(table.pop(key), self._absent, 1)


def _small_keys(keys: BlockKeys) -> list[int]:
    if isinstance(keys, np.ndarray):
        small: list[int] = (keys & np.uint64(_KEY_MASK)).tolist()
        return small
    return [key & _KEY_MASK for key in keys]
