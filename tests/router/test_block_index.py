"""The block index against a model that keeps plain sets, and its bound."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrelay.core.kv_events import Tier
from kvrelay.router.block_index import BlockIndex

MAX_NODES = 40
"""More than are read bit by bit, so that both ways of reading a mask are met."""
CHAIN = tuple((number << 58) + number for number in range(1, 25))
"""Keys that fill all 64 bits."""

node_slots = st.integers(0, MAX_NODES - 1)
tiers = st.sampled_from(list(Tier))
some_keys = st.lists(st.sampled_from(CHAIN), max_size=30)
chain_starts = st.integers(0, len(CHAIN)).map(lambda length: list(CHAIN[:length]))
batches = some_keys | chain_starts


class IndexMachine(RuleBasedStateMachine):
    """Never full, so that it must equal the model."""

    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex(10_000, MAX_NODES)
        self.held: dict[tuple[int, Tier], set[int]] = defaultdict(set)

    @rule(node=node_slots, keys=batches, tier=tiers, as_array=st.booleans())
    def store(self, node: int, keys: list[int], tier: Tier, as_array: bool) -> None:
        self.index.store(node, np.array(keys, np.uint64) if as_array else keys, tier)
        self.held[node, tier] |= set(keys)

    @rule(keys=batches, tier=tiers)
    def store_everywhere(self, keys: list[int], tier: Tier) -> None:
        for node in range(MAX_NODES):
            self.store(node, keys, tier, as_array=False)

    @rule(node=node_slots, keys=batches, tier=tiers)
    def remove(self, node: int, keys: list[int], tier: Tier) -> None:
        self.index.remove(node, keys, tier)
        self.held[node, tier] -= set(keys)

    @rule(node=node_slots)
    def clear(self, node: int) -> None:
        self.index.clear(node)
        for tier in Tier:
            self.held[node, tier] = set()

    @invariant()
    def counts_every_entry_once(self) -> None:
        assert self.index.num_entries == sum(len(keys) for keys in self.held.values())
        assert self.index.num_evicted == 0

    @rule(keys=st.permutations(CHAIN) | chain_starts)
    def matches_as_the_model(self, keys: Sequence[int]) -> None:
        match = self.index.match_prefix(keys)
        for node in range(MAX_NODES):
            device, host = self.held[node, Tier.DEVICE], self.held[node, Tier.HOST]
            assert match.device[node] == _num_leading(keys, device), f"node {node}"
            assert match.either[node] == _num_leading(keys, device | host), f"node {node}"


def _num_leading(keys: Sequence[int], held: set[int]) -> int:
    for depth, key in enumerate(keys):
        if key not in held:
            return depth
    return len(keys)


IndexMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestIndexEqualsModel = IndexMachine.TestCase


class FullIndexMachine(RuleBasedStateMachine):
    """Often full: it may forget, but never invent, nor exceed its bound."""

    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex(12, MAX_NODES)
        self.held: dict[tuple[int, Tier], set[int]] = defaultdict(set)

    @rule(node=node_slots, keys=batches, tier=tiers)
    def store(self, node: int, keys: list[int], tier: Tier) -> None:
        self.index.store(node, keys, tier)
        self.held[node, tier] |= set(keys)

    @rule(node=node_slots, keys=batches, tier=tiers)
    def remove(self, node: int, keys: list[int], tier: Tier) -> None:
        self.index.remove(node, keys, tier)
        self.held[node, tier] -= set(keys)

    @rule(node=node_slots)
    def clear(self, node: int) -> None:
        self.index.clear(node)
        for tier in Tier:
            self.held[node, tier] = set()

    @invariant()
    def invents_nothing_and_keeps_its_bound(self) -> None:
        assert 0 <= self.index.num_entries <= self.index.max_entries
        num_found = 0
        for key in CHAIN:
            match = self.index.match_prefix([key])
            for node in range(MAX_NODES):
                if match.device[node]:
                    assert key in self.held[node, Tier.DEVICE]
                if match.either[node]:
                    assert key in self.held[node, Tier.DEVICE] | self.held[node, Tier.HOST]
                num_found += int(match.either[node])
        assert num_found <= self.index.num_entries


FullIndexMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestFullIndex = FullIndexMachine.TestCase


def test_a_full_index_forgets_what_was_stored_longest_ago() -> None:
    index = BlockIndex(max_entries=4, max_nodes=4)
    for key in (1, 2, 3, 4):
        index.store(0, [key])
    index.store(1, [1])  # 1 is the youngest now, and held by two nodes

    assert (index.num_entries, index.num_evicted) == (4, 1)
    found = [key for key in (1, 2, 3, 4) if index.match_prefix([key]).device[0]]
    assert found == [1, 3, 4]


def test_blocks_of_a_lost_node_make_room_before_anything_is_forgotten() -> None:
    index = BlockIndex(max_entries=100, max_nodes=4)
    index.store(0, range(100))
    index.clear(0)
    index.store(1, range(1000, 1100))

    assert (index.num_entries, index.num_evicted) == (100, 0)
    assert index.match_prefix(range(1000, 1100)).device.tolist() == [0, 100, 0, 0]


def test_a_large_index_keeps_the_young_of_all_its_tables() -> None:
    index = BlockIndex(max_entries=100_000, max_nodes=4)
    rng = np.random.default_rng(7)
    old, young = (rng.integers(0, 2**64, 90_000, dtype=np.uint64) for _ in range(2))
    index.store(0, old)
    index.store(1, young)

    assert index.num_entries <= 100_000
    assert index.num_evicted == 180_000 - index.num_entries
    assert index.match_prefix(young).device[1] == 90_000


def test_its_size_follows_what_it_holds() -> None:
    index = BlockIndex(max_entries=1_000_000, max_nodes=64)
    empty = index.num_bytes
    index.store(3, np.random.default_rng(7).integers(0, 2**64, 50_000, dtype=np.uint64))

    assert empty < 1_000_000
    assert 40 < (index.num_bytes - empty) / 50_000 < 200


def test_a_slot_outside_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="node 4 of 4"):
        BlockIndex(10, max_nodes=4).store(4, [1])
