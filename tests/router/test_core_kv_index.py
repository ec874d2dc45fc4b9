"""How the nodes' KV events come into the router's index, and what it does while something is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvrelay.core.kv_events import KVChanges, KVEvent
from kvrelay.router.block_keys import PromptBlocks

PROMPT = tuple(range(5, 18))
"""Three full blocks of 4 tokens, and one token."""
ASK = ["p1 <- send a KV snapshot"]


def snapshot(*keys: int, first: int = 1, part: int = 0, num_parts: int = 1) -> KVEvent:
    return KVEvent(first, 0, KVChanges(stored=keys, cleared=part == 0), part, num_parts)


def stored(first: int, *keys: int) -> KVEvent:
    return KVEvent(first, 1, KVChanges(stored=keys))


def removed(first: int, *keys: int) -> KVEvent:
    return KVEvent(first, 1, KVChanges(removed=keys))


def proof(first: int) -> KVEvent:
    return KVEvent(first, 0, KVChanges())


class Index:
    """What a transcript's router knows."""

    def __init__(self, transcript: Any) -> None:
        self.transcript = transcript

    def holds(self, node_id: str, *keys: int) -> bool:
        """Whether the node is believed to hold all of these."""
        cluster = self.transcript.core._cluster
        slot = cluster.nodes[node_id].slot
        return all(cluster.block_index.match_prefix([key]).device[slot] for key in keys)

    def depth(self, node_id: str, *keys: int) -> int:
        """How many of these, from the first on, the node is believed to hold."""
        cluster = self.transcript.core._cluster
        return int(cluster.block_index.match_prefix(keys).device[cluster.nodes[node_id].slot])

    @property
    def stale(self) -> set[str]:
        status = self.transcript.core.status(self.transcript.now_s)
        return {node.description.node_id for node in status.nodes if node.is_index_stale}


@pytest.fixture
def index(cluster: Any) -> Index:
    return Index(cluster)


def keys_of(say: Any, prompt: tuple[int, ...] = PROMPT, block_size: int = 4) -> list[int]:
    digest = say.describe_node("p1").fingerprint.digest
    keys: list[int] = PromptBlocks(prompt).keys(block_size, digest).tolist()
    return keys


def test_a_node_is_stale_until_its_whole_snapshot_is_there(cluster: Any, index: Index) -> None:
    assert index.stale == {"p1", "d1"}
    cluster.report("p1", kv=snapshot(1, 2, num_parts=2))
    assert index.stale == {"p1", "d1"}
    cluster.report("p1", kv=snapshot(3, part=1, num_parts=2))
    assert index.stale == {"d1"}
    assert index.holds("p1", 1, 2, 3)
    assert not index.holds("d1", 1)


def test_changes_follow_the_snapshot(cluster: Any, index: Index) -> None:
    cluster.report("p1", kv=snapshot(1, 2, first=7))
    cluster.report("p1", kv=stored(7, 3))
    assert cluster.report("p1", kv=removed(8, 1)) == []
    assert [index.holds("p1", key) for key in (1, 2, 3)] == [False, True, True]
    assert index.stale == {"d1"}


def test_a_gap_is_seen_asked_about_once_and_repaired(cluster: Any, index: Index) -> None:
    cluster.report("p1", kv=snapshot(1, 2))
    assert cluster.report("p1", kv=stored(3, 5)) == ASK
    assert index.stale == {"p1", "d1"}
    assert cluster.report("p1", kv=stored(4, 6)) == []
    assert index.holds("p1", 1, 2), "what is known is better than nothing"
    assert not index.holds("p1", 5)
    cluster.report("p1", kv=snapshot(2, 5, 6, first=5))
    cluster.report("p1", kv=stored(5, 7))
    assert index.stale == {"d1"}
    assert [index.holds("p1", key) for key in (1, 2, 5, 6, 7)] == [False, True, True, True, True]


@pytest.mark.parametrize("event", [stored(2, 9), proof(2), snapshot(9, first=3, part=1, num_parts=3)])
def test_what_shows_that_something_is_missing(cluster: Any, event: KVEvent) -> None:
    cluster.report("p1", kv=snapshot(1))
    assert cluster.report("p1", kv=event) == ASK


def test_a_lost_part_of_a_snapshot_is_seen(cluster: Any) -> None:
    cluster.report("p1", kv=snapshot(1, num_parts=3))
    assert cluster.report("p1", kv=snapshot(3, part=2, num_parts=3)) == ASK


def test_an_event_without_changes_confirms(cluster: Any, index: Index) -> None:
    cluster.report("p1", kv=snapshot(1))
    assert cluster.report("p1", kv=proof(1)) == []
    assert index.stale == {"d1"}


def test_a_snapshot_that_does_not_come_is_asked_for_again(cluster: Any) -> None:
    cluster.report("p1", kv=snapshot(1))
    cluster.report("p1", kv=stored(9, 5))
    assert cluster.tick(1.9) == []
    assert cluster.tick(2.0) == ASK
    assert cluster.tick(3.9) == []
    assert cluster.tick(4.0) == ASK
    cluster.report("p1", kv=snapshot(5, first=10))
    assert cluster.tick(9.0) == []


def test_a_node_that_says_nothing_of_its_blocks_becomes_stale(cluster: Any, index: Index) -> None:
    for node_id in ("p1", "d1"):
        cluster.report(node_id, kv=snapshot(1))
    cluster.now_s = 4.0
    cluster.report("d1", kv=proof(1))
    cluster.now_s = 6.0
    assert index.stale == {"p1"}
    assert cluster.report("p1", kv=proof(1)) == []
    assert index.stale == set()


def test_while_a_node_is_stale_its_prompts_are_taken_as_stored(cluster: Any, index: Index, say: Any) -> None:
    cluster.report("d1", kv=snapshot())
    cluster.submit(prompt=PROMPT)
    keys = keys_of(say)
    assert len(keys) == 3
    assert index.holds("p1", *keys)
    assert not any(index.holds("d1", key) for key in keys), "it is not stale, it will say so itself"
    cluster.report("p1", kv=snapshot(keys[0]))
    assert [index.holds("p1", key) for key in keys] == [True, False, False]


def test_guesses_made_while_a_node_was_silent_are_replaced(cluster: Any, index: Index, say: Any) -> None:
    cluster.report("p1", kv=snapshot(1))
    cluster.now_s = 6.0
    cluster.submit(prompt=PROMPT)
    keys = keys_of(say)
    assert index.holds("p1", 1, *keys)
    assert cluster.report("p1", kv=stored(1, 2)) == ASK
    cluster.report("p1", kv=snapshot(1, 2, first=2))
    assert index.holds("p1", 1, 2)
    assert not any(index.holds("p1", key) for key in keys)


def test_a_node_has_no_more_guesses_than_blocks(new_transcript: Callable[..., Any], say: Any) -> None:
    transcript = new_transcript()
    transcript.attach("p1", "d1", num_blocks=5)
    prompts = [tuple(range(start, start + 9)) for start in (10, 30, 50)]
    for number, prompt in enumerate(prompts):
        transcript.submit(f"r{number}", prompt=prompt, stream_id=number)
        transcript.cancel(f"r{number}")
        for node_id in ("p1", "d1"):
            transcript.report(node_id, say.released(number + 1))
    index = Index(transcript)
    assert [index.depth("p1", *keys_of(say, prompt)) for prompt in prompts] == [0, 2, 2]


def test_prompts_are_hashed_for_each_nodes_block_size_and_salt(
    new_transcript: Callable[..., Any], say: Any
) -> None:
    transcript = new_transcript()
    transcript.attach("p1", block_size=2)
    transcript.attach("d1", block_size=8)
    transcript.submit(prompt=PROMPT)
    index = Index(transcript)
    assert index.depth("p1", *keys_of(say, block_size=2)) == 6
    assert index.depth("d1", *keys_of(say, block_size=8)) == 1
    digest = say.describe_node("p1").fingerprint.digest
    salted = PromptBlocks(PROMPT, b"salt").keys(2, digest)
    assert index.depth("p1", *salted.tolist()) == 0


def test_what_a_node_held_goes_with_it(cluster: Any, index: Index) -> None:
    cluster.report("p1", kv=snapshot(1, 2))
    cluster.report("d1", kv=snapshot(1))
    cluster.lose("p1")
    assert cluster.core.status(0.0).index.num_entries == 1
    cluster.attach("p2")
    assert not index.holds("p2", 1)


def test_a_node_that_starts_again_begins_anew(cluster: Any, index: Index) -> None:
    cluster.report("p1", kv=snapshot(1, 2, first=50))
    cluster.attach("p1", incarnation=2)
    assert not index.holds("p1", 1)
    assert index.stale == {"p1", "d1"}
    assert cluster.report("p1", kv=snapshot(3)) == []
    assert cluster.report("p1", kv=stored(1, 4)) == []
    assert index.holds("p1", 3, 4)


def test_nodes_beyond_the_index_serve_and_stay_stale(new_transcript: Callable[..., Any]) -> None:
    transcript = new_transcript(max_indexed_nodes=1)
    transcript.attach("p1", "d1")
    index = Index(transcript)
    for node_id in ("p1", "d1"):
        assert transcript.report(node_id, kv=snapshot(1)) == []
    assert index.stale == {"d1"}
    assert transcript.submit(prompt=PROMPT)[0].startswith("d1 <- reserve 1")
    transcript.lose("p1")
    transcript.attach("p2")
    transcript.report("p2", kv=snapshot(2))
    assert index.holds("p2", 2)


def test_the_index_keeps_its_bound_and_says_what_it_dropped(new_transcript: Callable[..., Any]) -> None:
    transcript = new_transcript(max_index_entries=10)
    transcript.attach("p1", "d1")
    transcript.report("p1", kv=snapshot(*range(1, 16)))
    status = transcript.core.status(0.0).index
    assert (status.num_entries, status.num_evicted, status.max_entries) == (10, 5, 10)
    assert status.num_bytes > 0


def test_events_and_gaps_are_counted(cluster: Any) -> None:
    for event in (snapshot(1), stored(1, 2), stored(9, 5), stored(10, 6)):
        cluster.report("p1", kv=event)
    counters = cluster.core.status(0.0).counters
    assert (counters.num_kv_events, counters.num_kv_gaps) == (4, 1)
