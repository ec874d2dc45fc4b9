"""The blocks of sequences: found in the prefix cache, taken, grown, registered and freed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from kvrelay.core.ids import BlockId
from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.host_tier import BlockCopy
from kvrelay.engine.sequence import Chunk, LiveSequence


class SequenceBlocks:
    """Over one pool. Blocks that a step under way still writes are freed when it has landed.

    Hashing and registering a long prompt's blocks takes milliseconds (some 1.5 us a block), so it can be put
    off until the device is busy with a step; who looks into the prefix cache finds it complete all the same.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self._block_size = block_size
        self._num_launched = 0
        self._num_landed = 0
        self._late_blocks: list[tuple[int, list[BlockId]]] = []
        self._put_off: dict[LiveSequence, None] = {}
        self.prefix_hit_tokens = 0
        self.prefix_query_tokens = 0
        self.host_hit_tokens = 0

    def fits(self, sequence: LiveSequence, num_spare_blocks: int) -> bool:
        """Whether `take` would find room."""
        return self._has_room(sequence, self._match_prefix(sequence), num_spare_blocks)

    def take(self, sequence: LiveSequence, num_spare_blocks: int) -> bool:
        """Take blocks for all of its tokens and leave `num_spare_blocks`; False: there is no room."""
        matched = self._match_prefix(sequence)
        if not self._has_room(sequence, matched, num_spare_blocks):
            return False
        num_blocks = self._num_blocks(sequence)
        sequence.block_table = self.pool.take(matched, sequence.hashes[: len(matched)], num_blocks)
        sequence.num_registered_blocks = len(matched)
        sequence.num_cached_tokens = sequence.num_computed_tokens = len(matched) * self._block_size
        self.prefix_hit_tokens += sequence.num_cached_tokens
        self.host_hit_tokens += matched.count(None) * self._block_size
        self.prefix_query_tokens += len(sequence.token_ids)
        return True

    def holds(self, sequence: LiveSequence, num_tokens: int) -> bool:
        """Whether its blocks have room for so many tokens."""
        return num_tokens <= len(sequence.block_table) * self._block_size

    def grow(self, sequence: LiveSequence) -> None:
        """One block more; the pool has one."""
        sequence.block_table += self.pool.allocate(1, after=sequence.block_table[-1])

    def register(self, sequence: LiveSequence) -> None:
        """Its first `num_computed_tokens` are final: the blocks that they fill join the prefix cache."""
        if sequence not in self._put_off:
            self._register(sequence, None)

    def register_later(self, sequence: LiveSequence) -> None:
        """As `register`, in `catch_up`."""
        self._put_off[sequence] = None

    def catch_up(self, max_blocks: int | None = None) -> None:
        """Register what was put off, at most so many blocks."""
        while self._put_off and (max_blocks is None or max_blocks > 0):
            sequence = next(iter(self._put_off))
            num_before = sequence.num_registered_blocks
            if self._register(sequence, max_blocks):
                del self._put_off[sequence]
            if max_blocks is not None:
                max_blocks -= sequence.num_registered_blocks - num_before

    def _register(self, sequence: LiveSequence, max_blocks: int | None) -> bool:
        """Whether that was all."""
        block_size, first = self._block_size, sequence.num_registered_blocks
        num_full = sequence.num_computed_tokens // block_size
        end = num_full if max_blocks is None else min(num_full, first + max_blocks)
        for index in range(first, end):
            self.pool.register(sequence.block_table[index], sequence.block_hash(index, block_size))
        sequence.num_registered_blocks = max(end, first)
        return end == num_full

    def free(self, sequence: LiveSequence) -> None:
        """All of its blocks: now, or when the last step that computes it has landed."""
        if sequence in self._put_off:
            self._register(sequence, None)
            del self._put_off[sequence]
        if sequence.latest_step > self._num_landed:
            self._late_blocks.append((sequence.latest_step, sequence.block_table))
        else:
            self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = sequence.num_cached_tokens = sequence.num_registered_blocks = 0

    def launch(self, sequences: Iterable[LiveSequence]) -> None:
        """A step that computes these is under way; steps land in the order in which they were launched."""
        self._num_launched += 1
        for sequence in sequences:
            sequence.latest_step = self._num_launched

    def land(self) -> None:
        """The first of the steps under way is over."""
        self._num_landed += 1
        assert self._num_landed <= self._num_launched
        late_blocks, self._late_blocks = self._late_blocks, []
        for step, block_table in late_blocks:
            if step <= self._num_landed:
                self.pool.release(block_table)
            else:
                self._late_blocks.append((step, block_table))

    def finds_more_behind(self, sequence: LiveSequence, chunks: Iterable[Chunk]) -> bool:
        """Whether more of the prefix of one that waits is cached once these chunks are computed."""
        index, block_size = len(self._match_prefix(sequence)), self._block_size
        if index >= self._num_matchable(sequence):
            return False
        wanted = sequence.block_hash(index, block_size)
        return any(
            index < chunk.end // block_size and chunk.sequence.block_hash(index, block_size) == wanted
            for chunk in chunks
        )

    def take_copies(self) -> list[BlockCopy]:
        """What is to be copied between device and host before anything else happens to the blocks."""
        return [] if self.pool.host_tier is None else self.pool.host_tier.take_copies()

    def check(self, live: Iterable[LiveSequence], others: Iterable[BlockId] = ()) -> None:
        """Assert every invariant; for tests. `others` are held for no sequence."""
        self.pool.check()
        assert all(sequence.block_table for sequence in self._put_off), "put off, and freed"
        live = list(live)
        held = Counter(block for sequence in live for block in sequence.block_table)
        held.update(block for _, block_table in self._late_blocks for block in block_table)
        held.update(others)
        for block, num_holders in held.items():
            assert self.pool.num_references(block) == num_holders, (
                f"block {block} is held {num_holders} times"
            )
            assert num_holders == 1 or self.pool.is_registered(block), f"block {block} is two sequences' own"
        assert all(step > self._num_landed for step, _ in self._late_blocks), "no step computes them any more"
        assert len(held) == self.pool.num_held, "a block is held that no live sequence names"

    def _num_blocks(self, sequence: LiveSequence) -> int:
        return -(-len(sequence.token_ids) // self._block_size)

    def _match_prefix(self, sequence: LiveSequence) -> list[BlockId | None]:
        """Cached blocks of its prefix, None where the host has it; never of all its tokens: the last token
        must be computed."""
        self.catch_up()
        return self.pool.match_prefix(
            sequence.block_hash(index, self._block_size) for index in range(self._num_matchable(sequence))
        )

    def _num_matchable(self, sequence: LiveSequence) -> int:
        return (len(sequence.token_ids) - 1) // self._block_size

    def _has_room(
        self, sequence: LiveSequence, matched: Sequence[BlockId | None], num_spare_blocks: int
    ) -> bool:
        """Cached blocks that it takes over are free ones that it uses up, too."""
        on_device = [block for block in matched if block is not None]
        num_missing = self._num_blocks(sequence) - len(on_device) + self.pool.num_unheld(on_device)
        return num_missing + num_spare_blocks <= self.pool.num_free
