"""Blocks held for prefixes that travel between nodes, whatever sequences there are.

A prefix that is sent away is *pinned*: its cached blocks stay where they are while a transfer reads them. For
one that is to arrive, blocks are *reserved*; what has arrived joins the prefix cache, as if it had been
computed here, and is given up at once: the prompt that wants it finds it there, and nobody who waits for room
waits for a prompt that waits.

Pure bookkeeping: no KV bytes here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvrelay.core.block_hash import BlockHash, chain_hashes, root_hash
from kvrelay.core.errors import DuplicateRequest, Overloaded
from kvrelay.core.ids import BlockId
from kvrelay.core.request import Prefix
from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.interface import Reservation, SequenceKey


@dataclass(frozen=True, slots=True)
class HeldPrefix:
    """`block_table` holds `prefix`; `hashes` are of its full blocks, of which the first `num_cached_blocks`
    were in the prefix cache when it was taken."""

    prefix: Prefix
    hashes: list[BlockHash]
    block_table: list[BlockId]
    num_cached_blocks: int


class PrefixHolds:
    """Over one engine's pool. Keys are of the same kind as those of sequences, and none is both."""

    def __init__(self, pool: BlockPool, block_size: int, fingerprint_digest: bytes) -> None:
        self._pool = pool
        self._block_size = block_size
        self._fingerprint_digest = fingerprint_digest
        self._held: dict[SequenceKey, HeldPrefix] = {}

    def __len__(self) -> int:
        return len(self._held)

    def blocks(self) -> Iterator[BlockId]:
        """All that are held, some perhaps twice; for tests."""
        return (block for held in self._held.values() for block in held.block_table)

    def pin(self, prefix: Prefix, key: SequenceKey) -> Reservation:
        """Hold as much of `prefix` as the cache has and can be held now; what the host tier alone has is
        restored.

        Raises:
            DuplicateRequest: the key is in use.
        """
        hashes = self._hashes(prefix, key)
        matched = self._pool.match_prefix(hashes)
        del matched[self._num_holdable(matched) :]
        return self._hold(key, prefix, hashes, matched, len(matched))

    def reserve(self, prefix: Prefix, key: SequenceKey) -> Reservation:
        """Take blocks for all of `prefix`, those first that the cache has.

        Raises:
            Overloaded: there is no room now.
            DuplicateRequest: the key is in use.
        """
        hashes = self._hashes(prefix, key)
        matched = self._pool.match_prefix(hashes)
        num_blocks = -(-len(prefix.token_ids) // self._block_size)
        if self._num_needed(matched, num_blocks) > self._pool.num_free:
            raise Overloaded(
                f"a prefix of {len(prefix.token_ids)} tokens does not fit the {self._pool.num_free} KV blocks"
                " now free"
            )
        return self._hold(key, prefix, hashes, matched, num_blocks)

    def held(self, key: SequenceKey) -> HeldPrefix | None:
        """What is held under that key."""
        return self._held.get(key)

    def keep(self, key: SequenceKey, num_tokens: int) -> int:
        """The first `num_tokens` tokens of a reserved prefix are here: their full blocks join the prefix
        cache. Gives the hold up; returns how many tokens are in those blocks."""
        held = self._held.get(key)
        if held is None:
            return 0
        num_full = min(num_tokens // self._block_size, len(held.hashes))
        for index in range(held.num_cached_blocks, num_full):
            self._pool.register(held.block_table[index], held.hashes[index])
        self.release(key)
        return num_full * self._block_size

    def release(self, key: SequenceKey) -> None:
        """Give up what is held; unknown keys are ignored."""
        held = self._held.pop(key, None)
        if held is not None:
            self._pool.release(held.block_table)

    def _hashes(self, prefix: Prefix, key: SequenceKey) -> list[BlockHash]:
        if key in self._held:
            raise DuplicateRequest(f"a prefix is held under the key {key!r} already")
        root = root_hash(prefix.cache_salt, self._fingerprint_digest)
        return chain_hashes(prefix.token_ids, self._block_size, root)

    def _num_holdable(self, matched: list[BlockId | None]) -> int:
        """How many of them, from the first on, use up no more than the free blocks."""
        num_left = self._pool.num_free
        for index, block in enumerate(matched):
            num_left -= 1 if block is None else self._pool.num_unheld([block])
            if num_left < 0:
                return index
        return len(matched)

    def _num_needed(self, matched: list[BlockId | None], num_blocks: int) -> int:
        """Free blocks that a table of `num_blocks` uses up: cached ones that it takes over count, too."""
        on_device = [block for block in matched if block is not None]
        return num_blocks - len(on_device) + self._pool.num_unheld(on_device)

    def _hold(
        self,
        key: SequenceKey,
        prefix: Prefix,
        hashes: list[BlockHash],
        matched: list[BlockId | None],
        num_blocks: int,
    ) -> Reservation:
        table = self._pool.take(matched, hashes[: len(matched)], num_blocks)
        self._held[key] = HeldPrefix(prefix, hashes, table, len(matched))
        return Reservation(key, tuple(table), len(matched) * self._block_size)
