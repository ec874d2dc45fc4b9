"""A node's KV events, from the engine's changes to a router's index: whatever is late or lost, the index
holds what the node holds in the end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from kvrelay.core.kv_events import KVChanges, KVEvent, Tier, merge_changes, split_changes
from kvrelay.node.kv_feed import KVCursor, KVFeed
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.kv_intake import KVIntake

KEYS = range(1, 25)
NUM_BLOCKS = 64
CONFIG = RouterCoreConfig(max_index_entries=1000, max_indexed_nodes=8)

key_sets = st.sets(st.sampled_from(KEYS), max_size=10)


class RouterEnd:
    """One router's end of a stream; `asks` is a request for a snapshot that is on its way to the node."""

    def __init__(self, feed: KVFeed) -> None:
        self.intake = KVIntake(CONFIG)
        self.intake.add_node(NUM_BLOCKS, 0.0)  # so that the node under test is not the index's first
        self.attach(feed)

    def attach(self, feed: KVFeed) -> None:
        self.cursor = feed.cursor()
        self.holdings = self.intake.add_node(NUM_BLOCKS, 0.0)
        self.asks = False

    def hear(self, event: KVEvent) -> None:
        self.asks |= self.intake.apply(self.holdings, event, 0.0)

    def held(self, tier: Tier) -> set[int]:
        slot = self.holdings.slot
        matches = {key: self.intake.index.match_prefix([key]) for key in KEYS}
        if tier is Tier.DEVICE:
            return {key for key, match in matches.items() if match.device[slot]}
        return {key for key, match in matches.items() if match.either[slot]}


class FeedMachine(RuleBasedStateMachine):
    """One node, two routers; little is buffered, so that streams often fall behind."""

    def __init__(self) -> None:
        super().__init__()
        self.feed = KVFeed(max_buffered_keys=20, max_keys_per_event=4)
        self.device: set[int] = set()
        self.host: set[int] = set()
        self.routers = [RouterEnd(self.feed), RouterEnd(self.feed)]

    @rule(stored=key_sets, removed=key_sets, host_stored=key_sets, host_removed=key_sets)
    def change(
        self, stored: set[int], removed: set[int], host_stored: set[int], host_removed: set[int]
    ) -> None:
        stored, host_stored = stored - removed, host_stored - host_removed
        self.device = (self.device - removed) | stored
        self.host = (self.host - host_removed) | host_stored
        self.feed.record(KVChanges(*map(sorted, (stored, removed, host_stored, host_removed))))

    @rule(device=key_sets, host=key_sets)
    def start_over(self, device: set[int], host: set[int]) -> None:
        self.device, self.host = device, host
        self.feed.record(KVChanges(sorted(device), [], sorted(host), [], cleared=True))

    @rule(number=st.integers(0, 1), times=st.integers(1, 6))
    def deliver(self, number: int, times: int) -> None:
        for _ in range(times):
            event = self.routers[number].cursor.take()
            if event is not None:
                assert event.changes.num_keys <= 4
                self.routers[number].hear(event)

    @rule(number=st.integers(0, 1))
    def lose_an_event(self, number: int) -> None:
        self.routers[number].cursor.take()

    @rule(number=st.integers(0, 1))
    def bring_the_request_for_a_snapshot(self, number: int) -> None:
        router = self.routers[number]
        if router.asks:
            router.cursor.restart()
            router.asks = False

    @rule(number=st.integers(0, 1))
    def attach_anew(self, number: int) -> None:
        router = self.routers[number]
        router.intake.remove_node(router.holdings)
        router.attach(self.feed)

    @rule(number=st.integers(0, 1), times=st.integers(0, 4))
    def lose_a_part_of_a_snapshot(self, number: int, times: int) -> None:
        self.routers[number].cursor.restart()
        self.deliver(number, times)
        self.lose_an_event(number)
        self.settle(number)

    @rule(number=st.integers(0, 1))
    def settle(self, number: int) -> None:
        router = self.routers[number]
        for _ in range(200):
            self.bring_the_request_for_a_snapshot(number)
            event = router.cursor.take() or router.cursor.proof()
            assert event is not None
            router.hear(event)
            if not router.asks and not router.cursor.has_more:
                break
        if router.holdings.next is None:  # a snapshot's beginning was lost: time has it asked for again
            router.asks = True
            return
        assert router.held(Tier.DEVICE) == self.device
        assert router.held(Tier.HOST) == self.device | self.host
        assert not router.intake.is_stale(router.holdings, 0.0)


FeedMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestIndexFollowsNode = FeedMachine.TestCase


def read_all(cursor: KVCursor) -> list[KVEvent]:
    return [event for event in iter(cursor.take, None) if event is not None]


def stored(*keys: int) -> KVChanges:
    return KVChanges(stored=keys)


def numbers(events: Sequence[KVEvent]) -> list[tuple[int, int]]:
    return [(event.first, event.num_batches) for event in events]


def test_a_stream_begins_with_what_is_held_and_goes_on_from_there() -> None:
    feed = KVFeed(1000)
    feed.record(stored(1, 2))
    feed.record(KVChanges(stored=(3,), removed=(1,)))
    cursor = feed.cursor()
    [snapshot] = read_all(cursor)
    assert snapshot.changes.cleared
    assert (list(snapshot.changes.stored), numbers([snapshot])) == ([2, 3], [(3, 0)])
    feed.record(stored(4))
    assert numbers(read_all(cursor)) == [(3, 1)]
    assert cursor.proof() == KVEvent(4, 0, KVChanges())


def test_what_comes_while_a_snapshot_is_being_sent_comes_behind_it() -> None:
    feed = KVFeed(1000, max_keys_per_event=2)
    feed.record(stored(1, 2))
    feed.record(stored(3, 4))
    cursor = feed.cursor()
    events = [cursor.take()]
    feed.record(KVChanges(removed=(4,)))
    events += read_all(cursor)
    assert [event and list(event.changes.removed) for event in events] == [[], [], [], [4]]
    assert [event and event.next_part for event in events] == [1, 2, 0, 0]


def test_batches_that_waited_go_as_one_event() -> None:
    feed = KVFeed(1000)
    cursor = feed.cursor()
    read_all(cursor)
    for changes in (stored(1, 2), KVChanges(removed=(1,)), stored(1), KVChanges(removed=(2,))):
        feed.record(changes)
    [event] = read_all(cursor)
    assert numbers([event]) == [(1, 4)]
    assert event.changes == KVChanges([1], [2], [], [])


def test_a_stream_that_is_too_far_behind_misses_numbers() -> None:
    feed = KVFeed(max_buffered_keys=6)
    cursor = feed.cursor()
    read_all(cursor)
    for key in range(10):
        feed.record(stored(key))
    assert numbers(read_all(cursor)) == [(8, 3)]


@pytest.mark.parametrize("cleared", [False, True])
def test_splitting_and_merging_changes_nothing(cleared: bool) -> None:
    changes = KVChanges([1, 2, 3], [4, 5], [6], [7, 8, 9, 10], cleared)
    parts = split_changes(changes, max_keys=2)
    assert max(part.num_keys for part in parts) <= 2
    assert merge_changes(parts) == changes
