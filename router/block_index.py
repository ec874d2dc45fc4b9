"""Which nodes hold which KV blocks: the first 8 bytes of a chained block hash -> nodes, by tier.

The index is a hint: it tells blocks apart by 60 bits of their hash, may lag behind the nodes, and forgets
what was stored longest ago when it is full. A node looks into its own cache under the whole hash, so a wrong
hint costs time and never gives a wrong answer.

A block's holders are a set, a bit mask that all blocks with the same holders share. A chain is mostly held as
a whole, so a run of its keys costs one computation of sets, and a lost node is struck from the sets, not from
the keys. The keys stand in many small tables, so that none takes longer than a moment to grow; these map
integers to integers, so that the garbage collector never walks through them.
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
"""Of a set of holders without its mask: its number, and its places in list and dict."""
_ABSENT: Final = 0
_KEYS_PER_TABLE: Final = 20_000
_EVICTED_SHARE: Final = 64
_FEW_BITS: Final = 12
"""Up to so many bits of a mask are quicker read one by one than all by an array."""


@dataclass(frozen=True, slots=True, eq=False)
class PrefixMatch:
    """How many leading blocks of one chain each node holds, ``int64[max_nodes]`` by node: `device` counts
    those on its device, `either` those in its host tier as well. Read only; both may be one array."""

    device: NDArray[np.int64]
    either: NDArray[np.int64]


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
        self.is_current: NDArray[np.bool_] = np.ones(max_nodes, np.bool_)
        """By node, whether what is stored of it is what it said last; set by whoever stores it."""
        self.num_evicted = 0
        """Entries dropped because of the bound."""
        num_tables = 1 << max(0, (max_entries // _KEYS_PER_TABLE).bit_length() - 1)
        self._tables: list[dict[int, int]] = [{} for _ in range(num_tables)]
        """From each key to the number of its set of holders."""
        self._table_mask = num_tables - 1
        self._next_table = 0
        self._num_keys = 0
        self._num_dead_keys = 0
        self._masks = [0]
        """By set: bit ``node`` means the node's device, ``max_nodes + node`` its host tier. Set `_ABSENT` is
        that of keys in no table."""
        self._keys_of_set = [0]
        self._set_of_mask: dict[int, int] = {}
        """Without the sets that came to equal another one, or nothing, when a node was lost."""
        self._free_sets: list[int] = []
        self._has_host_tier = False

    @property
    def num_bytes(self) -> int:
        """About how much memory it takes."""
        tables = sum(getsizeof(table) for table in self._tables)
        num_sets = len(self._masks)
        mask_bytes = self.max_nodes * (2 if self._has_host_tier else 1) // 8
        return tables + self._num_keys * _KEY_BYTES + num_sets * (_SET_BYTES + mask_bytes)

    # ---- what nodes hold ---------------------------------------------------------------------------

    def store(self, node: int, keys: BlockKeys, tier: Tier = Tier.DEVICE) -> None:
        """`node` holds these blocks in `tier`. What was stored longest ago is dropped, by all its holders,
        where there are more than `max_entries` now."""
        bit = self._bit(node, tier)
        self._has_host_tier |= tier is Tier.HOST
        tables, table_mask, masks = self._tables, self._table_mask, self._masks
        old = new = -1
        num_moved = 0
        for key in _small_keys(keys):
            table = tables[key & table_mask]
            found = table.pop(key, _ABSENT)  # so that it becomes its table's youngest
            if found != old:
                self._move(old, new, num_moved)
                old, new, num_moved = found, self._set_of(masks[found] | bit), 0
            table[key] = new
            num_moved += 1
        self._move(old, new, num_moved)
        self._make_room()

    def remove(self, node: int, keys: BlockKeys, tier: Tier = Tier.DEVICE) -> None:
        """`node` no longer holds these blocks in `tier`, if it did."""
        others = ~self._bit(node, tier)
        tables, table_mask, masks = self._tables, self._table_mask, self._masks
        old = new = -1
        num_moved = 0
        for key in _small_keys(keys):
            table = tables[key & table_mask]
            found = table.get(key, _ABSENT)
            if found == _ABSENT:
                continue
            if found != old:
                self._move(old, new, num_moved)
                mask = masks[found] & others
                old, new, num_moved = found, self._set_of(mask) if mask else _ABSENT, 0
            if new == _ABSENT:
                del table[key]
            else:
                table[key] = new
            num_moved += 1
        self._move(old, new, num_moved)

    def clear(self, node: int) -> None:
        """`node` holds nothing any more, in any tier."""
        bits = self._bit(node, Tier.DEVICE) | self._bit(node, Tier.HOST)
        for number, mask in enumerate(self._masks):
            if struck := mask & bits:
                self.num_entries -= self._keys_of_set[number] * struck.bit_count()
                self._replace_mask(number, mask ^ struck)

    # ---- what is asked -----------------------------------------------------------------------------

    def match_prefix(self, keys: BlockKeys) -> PrefixMatch:
        """How many blocks of the chain `keys`, first to last, each node holds without a gap."""
        tables, table_mask, masks = self._tables, self._table_mask, self._masks
        max_nodes, has_host_tier = self.max_nodes, self._has_host_tier
        node_mask = (1 << max_nodes) - 1
        num_bits = 2 * max_nodes if has_host_tier else max_nodes
        holding = (1 << num_bits) - 1
        ends: list[tuple[int, int]] = []
        last = -1
        small_keys = _small_keys(keys)
        for depth, key in enumerate(small_keys):
            found = tables[key & table_mask].get(key, _ABSENT)
            if found == last:
                continue
            last = found
            mask = masks[found]
            if has_host_tier:  # from here on the upper half means either tier
                mask |= (mask & node_mask) << max_nodes
            still_holding = holding & mask
            if still_holding != holding:
                ends.append((holding ^ still_holding, depth))
                holding = still_holding
                if not holding:
                    break
        ends.append((holding, len(small_keys)))
        counts = _depth_of_bits(ends, num_bits)
        return PrefixMatch(counts[:max_nodes], counts[-max_nodes:])

    # ---- sets of holders ---------------------------------------------------------------------------

    def _bit(self, node: int, tier: Tier) -> int:
        assert 0 <= node < self.max_nodes, f"node {node} of {self.max_nodes}"
        return 1 << (node if tier is Tier.DEVICE else self.max_nodes + node)

    def _set_of(self, mask: int) -> int:
        number = self._set_of_mask.get(mask)
        if number is None:
            if self._free_sets:
                number = self._free_sets.pop()
                self._masks[number] = mask
            else:
                number = len(self._masks)
                self._masks.append(mask)
                self._keys_of_set.append(0)
            self._set_of_mask[mask] = number
        return number

    def _move(self, old: int, new: int, num_keys: int) -> None:
        """So many keys went from one set to another."""
        if old == new:
            return
        masks, keys_of_set = self._masks, self._keys_of_set
        self.num_entries += num_keys * (masks[new].bit_count() - masks[old].bit_count())
        if new == _ABSENT:
            self._num_keys -= num_keys
        else:
            keys_of_set[new] += num_keys
        if old == _ABSENT:
            self._num_keys += num_keys
            return
        if not masks[old]:
            self._num_dead_keys -= num_keys
        keys_of_set[old] -= num_keys
        if not keys_of_set[old]:
            self._forget_mask(old)
            masks[old] = 0
            self._free_sets.append(old)

    def _forget_mask(self, number: int) -> None:
        mask = self._masks[number]
        if self._set_of_mask.get(mask) == number:
            del self._set_of_mask[mask]

    def _replace_mask(self, number: int, mask: int) -> None:
        self._forget_mask(number)
        self._masks[number] = mask
        if not mask:
            self._num_dead_keys += self._keys_of_set[number]
        else:
            self._set_of_mask.setdefault(mask, number)

    # ---- the bound ---------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Go round the tables; from each drop what nobody holds any more, and then its oldest keys."""
        while self._is_overfull():
            table = self._tables[self._next_table]
            self._next_table = (self._next_table + 1) & self._table_mask
            if self._num_dead_keys:
                masks = self._masks
                self._drop(table, [key for key, number in table.items() if not masks[number]])
            if self._is_overfull():
                num_before = self.num_entries
                self._drop(table, list(islice(table, -(-len(table) // _EVICTED_SHARE))))
                self.num_evicted += num_before - self.num_entries

    def _is_overfull(self) -> bool:
        return max(self.num_entries, self._num_keys) > self.max_entries

    def _drop(self, table: dict[int, int], keys: Iterable[int]) -> None:
        old, num_moved = _ABSENT, 0
        for key in keys:
            found = table.pop(key)
            if found != old:
                self._move(old, _ABSENT, num_moved)
                old, num_moved = found, 0
            num_moved += 1
        self._move(old, _ABSENT, num_moved)


def _small_keys(keys: BlockKeys) -> list[int]:
    if isinstance(keys, np.ndarray):
        small: list[int] = (keys & np.uint64(_KEY_MASK)).tolist()
        return small
    return [key & _KEY_MASK for key in keys]


def _depth_of_bits(ends: Iterable[tuple[int, int]], num_bits: int) -> NDArray[np.int64]:
    """By bit, the depth beside which it stands in `ends`, which are pairs of a mask and a depth; else 0."""
    counts = np.zeros(num_bits, np.int64)
    places: list[int] = []
    depths: list[int] = []
    for mask, depth in ends:
        if not depth:
            continue
        if mask.bit_count() > _FEW_BITS:
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
