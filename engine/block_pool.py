"""The KV block pool: who holds each block, which blocks carry a prefix worth keeping, what may be taken.

A block is in exactly one of three sets: *held* (reference count above 0), *cached* (unheld, but its
content is known under a block hash and may be found again) or *empty*. ``num_held + num_cached +
num_empty == num_blocks`` always. Cached blocks are evicted least recently used first, and within one
sequence last block first, because a prefix is useless without its beginning. With a host tier an evicted
block may be found there again.

Pure bookkeeping: no KV bytes here.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvrelay.core.block_hash import BlockHash, block_key
from kvrelay.core.ids import BlockId
from kvrelay.core.kv_events import KVChanges, changes_from
from kvrelay.engine.change_log import ChangeLog
from kvrelay.engine.host_tier import HostTier

_EMPTY, _TAKEN = 1, 0


class BlockPool:
    """Blocks ``0 <= id < num_blocks``, all empty at first.

    `spread` places each new run of blocks in the middle of the widest gap, so that running sequences can
    grow into the blocks right behind their own: a KV that lies in one piece is read without a copy. It
    costs a scan of the pool for each call of `allocate`; without it blocks come lowest first.
    """

    def __init__(self, num_blocks: int, *, spread: bool = False, host_tier: HostTier | None = None) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.host_tier = host_tier
        self._change_log = ChangeLog()
        self._spread = spread
        self._num_references = [0] * num_blocks
        self._hash_of_block: list[BlockHash | None] = [None] * num_blocks
        self._block_of_hash: dict[BlockHash, BlockId] = {}
        self._cached_unheld: OrderedDict[BlockId, None] = OrderedDict()
        self._empty_map = bytearray([_EMPTY]) * num_blocks
        self._num_empty = num_blocks
        self._lowest_empty = 0

    @property
    def num_empty(self) -> int:
        return self._num_empty

    @property
    def num_cached(self) -> int:
        return len(self._cached_unheld)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self._num_empty - len(self._cached_unheld)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out now: empty or evictable."""
        return self._num_empty + len(self._cached_unheld)

    def match_prefix(self, hashes: Iterable[BlockHash]) -> list[BlockId | None]:
        """Blocks that hold the longest known prefix of the chain `hashes`; None for those that the host tier
        alone has. Takes no reference."""
        found: list[BlockId | None] = []
        for block_hash in hashes:
            block = self._block_of_hash.get(block_hash)
            if block is None and (self.host_tier is None or block_hash not in self.host_tier):
                break
            found.append(block)
        return found

    def num_unheld(self, blocks: Iterable[BlockId]) -> int:
        """How many of `blocks` nobody holds: they stop being free when they are acquired."""
        return sum(1 for block in blocks if self._num_references[block] == 0)

    def acquire(self, blocks: Iterable[BlockId]) -> None:
        """Take one more reference to each of these held or cached blocks."""
        for block in blocks:
            if self._num_references[block] == 0:
                del self._cached_unheld[block]
            self._num_references[block] += 1

    def allocate(self, num: int, *, after: BlockId | None = None) -> list[BlockId]:
        """Take `num` blocks of unknown content, one reference each; evicts cached ones where needed.

        Tries first to continue right behind block `after`. The caller has checked `num_free`.
        """
        assert 0 <= num <= self.num_free, f"asked for {num} blocks, {self.num_free} are free"
        taken = self._take_behind(after, num) if after is not None else []
        if len(taken) < num and self._spread and self._num_empty:
            taken += self._take_from_widest_gap(num - len(taken))
        while len(taken) < num and self._num_empty:
            taken.append(self._take_lowest_empty())
        if len(taken) < num:
            taken += sorted(self._evict_one() for _ in range(num - len(taken)))
        for block in taken:
            self._num_references[block] = 1
        return taken

    def take(
        self, matched: Sequence[BlockId | None], hashes: Sequence[BlockHash], num_blocks: int
    ) -> list[BlockId]:
        """A table of `num_blocks` blocks, one reference each, that begins with what `match_prefix` has just
        found for `hashes`; what the host tier alone has is restored into fresh blocks. The caller has checked
        `num_free`."""
        self.acquire(block for block in matched if block is not None)
        missing = [block_hash for block_hash, block in zip(hashes, matched, strict=True) if block is None]
        if self.host_tier is not None:
            self.host_tier.hold(missing)  # or what is evicted now could take their slots
        fresh = iter(self.allocate(num_blocks - len(matched) + len(missing)))
        table: list[BlockId] = []
        for block_hash, block in zip(hashes, matched, strict=True):
            table.append(self._restore(block_hash, next(fresh)) if block is None else block)
        return [*table, *fresh]

    def register(self, block: BlockId, block_hash: BlockHash) -> bool:
        """The content of this held block is final and has this hash. False: another block has it already."""
        assert self._num_references[block] > 0, "only a held block can be registered"
        if block_hash in self._block_of_hash or self._hash_of_block[block] is not None:
            return False
        self._block_of_hash[block_hash] = block
        self._hash_of_block[block] = block_hash
        self._change_log.note(block_hash, is_held=True)
        return True

    def release(self, block_table: Sequence[BlockId]) -> None:
        """Give back one reference to each block of one sequence, first to last."""
        for block in reversed(block_table):
            self._num_references[block] -= 1
            if self._num_references[block] > 0:
                continue
            assert self._num_references[block] == 0, f"block {block} was released too often"
            if self._hash_of_block[block] is None:
                self._mark_empty(block)
            else:
                self._cached_unheld[block] = None

    def take_changes(self) -> KVChanges | None:
        """Which blocks can be found now that could not at the last call, and the reverse; None: no change.
        At the first call, and when more has changed than is noted, all that can be found, after `cleared`."""
        logs = [self._change_log] if self.host_tier is None else [self._change_log, self.host_tier.change_log]
        if any(log.is_lost for log in logs):
            for log in logs:
                log.restart()
            held = [self._block_of_hash.keys(), () if self.host_tier is None else self.host_tier.hashes()]
            device, host = (dict.fromkeys(map(block_key, hashes), True) for hashes in held)
            return changes_from(device, host, cleared=True)
        changed = [log.take() for log in logs]
        if not any(changed):
            return None
        by_key = [{block_key(name): is_held for name, is_held in of_tier.items()} for of_tier in changed]
        return changes_from(by_key[0], by_key[1] if len(by_key) > 1 else {})

    def num_references(self, block: BlockId) -> int:
        """How often this block is held."""
        return self._num_references[block]

    def is_registered(self, block: BlockId) -> bool:
        """Whether its content is final and known under a hash, so that several sequences may share it."""
        return self._hash_of_block[block] is not None

    def check(self) -> None:
        """Assert every invariant; O(num_blocks), for tests."""
        assert self._num_empty == sum(self._empty_map)
        assert self.num_held + self.num_cached + self.num_empty == self.num_blocks
        for index in range(self.num_blocks):
            block = BlockId(index)
            sets = (
                self._num_references[block] > 0,
                block in self._cached_unheld,
                self._empty_map[block] == _EMPTY,
            )
            assert sum(sets) == 1, f"block {block} is held, cached, empty: {sets}"
            block_hash = self._hash_of_block[block]
            assert (block_hash is not None) or not sets[1]
            assert block_hash is None or not sets[2]
            assert block_hash is None or self._block_of_hash[block_hash] == block
        assert len(self._block_of_hash) == sum(known is not None for known in self._hash_of_block)
        if self.host_tier is not None:
            self.host_tier.check()

    def _restore(self, block_hash: BlockHash, block: BlockId) -> BlockId:
        assert self.host_tier is not None
        self.host_tier.restore(block_hash, block)
        self.register(block, block_hash)
        return block

    def _take_behind(self, after: BlockId, num: int) -> list[BlockId]:
        taken: list[BlockId] = []
        block = after + 1
        while len(taken) < num and block < self.num_blocks and self._empty_map[block] == _EMPTY:
            taken.append(self._take_empty(block))
            block += 1
        return taken

    def _take_from_widest_gap(self, num: int) -> list[BlockId]:
        gaps = [match.span() for match in re.finditer(b"\x01+", self._empty_map)]
        start, end = max(gaps, key=lambda gap: gap[1] - gap[0])
        num_here = min(num, end - start)
        if start > 0:  # The block before the gap belongs to someone who may grow: leave it half the gap.
            start += (end - start - num_here) // 2
        return [self._take_empty(block) for block in range(start, start + num_here)]

    def _take_lowest_empty(self) -> BlockId:
        return self._take_empty(self._empty_map.find(_EMPTY, self._lowest_empty))

    def _take_empty(self, block: int) -> BlockId:
        self._empty_map[block] = _TAKEN
        self._num_empty -= 1
        if block == self._lowest_empty:
            self._lowest_empty = block + 1
        return BlockId(block)

    def _mark_empty(self, block: BlockId) -> None:
        self._empty_map[block] = _EMPTY
        self._num_empty += 1
        self._lowest_empty = min(self._lowest_empty, block)

    def _evict_one(self) -> BlockId:
        block, _ = self._cached_unheld.popitem(last=False)
        block_hash = self._hash_of_block[block]
        assert block_hash is not None
        del self._block_of_hash[block_hash]
        self._change_log.note(block_hash, is_held=False)
        self._hash_of_block[block] = None
        if self.host_tier is not None:
            self.host_tier.save(block, block_hash)
        return block
