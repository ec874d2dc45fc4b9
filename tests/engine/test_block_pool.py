"""The block pool never loses, doubles or forgets a block."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvrelay.core.block_hash import BlockHash
from kvrelay.engine.block_pool import BlockPool

NUM_BLOCKS = 12


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(32, "big"))


class PoolMachine(RuleBasedStateMachine):
    """Random sequences against a model that knows only what was acquired, registered and released."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[int]] = []
        self.content: dict[int, int] = {}  # block -> number of its hash, for blocks the pool must know
        self.spread = False
        self.pool = BlockPool(NUM_BLOCKS)

    @precondition(lambda self: not self.tables and not self.content)
    @rule(spread=st.booleans())
    def choose_placement(self, spread):
        self.pool = BlockPool(NUM_BLOCKS, spread=spread)

    @rule(num=st.integers(0, 5), after=st.none() | st.integers(0, NUM_BLOCKS - 1))
    def allocate(self, num, after):
        num = min(num, self.pool.num_free)
        held = {block for table in self.tables for block in table}
        unheld_known = [block for block in self.content if block not in held]
        num_empty = self.pool.num_empty
        blocks = self.pool.allocate(num, after=after)
        assert len(set(blocks)) == num
        assert not set(blocks) & held
        evicted = set(blocks) & set(unheld_known)
        assert len(evicted) == max(0, num - num_empty), "known blocks are evicted only when none is empty"
        for block in blocks:
            self.content.pop(block, None)
        if blocks:
            self.tables.append(list(blocks))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), number=st.integers(0, 30))
    def register(self, data, number):
        table = data.draw(st.sampled_from(self.tables))
        block = data.draw(st.sampled_from(table))
        accepted = self.pool.register(block, name(number))
        assert accepted == (number not in self.content.values() and block not in self.content)
        if accepted:
            self.content[block] = number

    @rule(numbers=st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True))
    def acquire_prefix(self, numbers):
        found = self.pool.match_prefix(map(name, numbers))
        known = {number: block for block, number in self.content.items()}
        expected = []
        for number in numbers:
            if number not in known:
                break
            expected.append(known[number])
        assert found == expected
        if found:
            self.pool.acquire(found)
            self.tables.append(found)

    @invariant()
    def every_block_is_in_one_set(self):
        self.pool.check()
        held = {block for table in self.tables for block in table}
        assert self.pool.num_held == len(held)
        assert self.pool.num_cached == len(set(self.content) - held)
        assert self.pool.num_held + self.pool.num_cached + self.pool.num_empty == NUM_BLOCKS


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def test_least_recently_used_blocks_are_evicted_first_and_tails_before_heads():
    pool = BlockPool(6)
    first, second = pool.allocate(3), pool.allocate(3)
    for number, block in enumerate(first + second):
        assert pool.register(block, name(number))
    pool.release(first)
    pool.release(second)
    assert pool.allocate(1) == [first[2]]
    assert pool.allocate(1) == [first[1]]
    assert len(pool.match_prefix([name(0), name(1)])) == 1


def test_acquired_cached_blocks_are_not_evicted():
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    for number, block in enumerate(blocks):
        pool.register(block, name(number))
    pool.release(blocks)
    pool.acquire(blocks[:2])
    assert pool.num_free == 2
    assert set(pool.allocate(2)) == set(blocks[2:])


def test_releasing_too_often_is_a_bug_that_crashes():
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    pool.release([block])
    with pytest.raises(AssertionError, match="too often"):
        pool.release([block])


@given(st.lists(st.integers(1, 6), min_size=2, max_size=6))
def test_spread_leaves_each_sequence_room_to_grow_in_place(sizes):
    pool = BlockPool(1024, spread=True)
    tables = [pool.allocate(size) for size in sizes]
    for _ in range(20):
        for table in tables:
            table += pool.allocate(1, after=table[-1])
    for table in tables:
        assert table == list(range(table[0], table[0] + len(table)))
