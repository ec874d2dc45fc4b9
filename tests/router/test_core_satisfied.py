"""A caller that has all it wants: the request ends well in any state, and its nodes let go."""

from collections.abc import Callable
from typing import Any

import pytest


def queued(cluster: Any, say: Any) -> None:
    cluster.lose("d1")
    cluster.submit()
    assert cluster.state() == {"queued": 1}


def prefilling(cluster: Any, say: Any) -> None:
    cluster.submit()
    assert cluster.state() == {"prefilling": 1}


def handing_off(cluster: Any, say: Any) -> None:
    cluster.submit()
    cluster.first_token()
    assert cluster.state() == {"handing_off": 1}


def decoding(cluster: Any, say: Any) -> None:
    handing_off(cluster, say)
    cluster.verify()
    cluster.tokens("d1", 1, 1, 11)
    assert cluster.state() == {"decoding": 1}


def verified_before_the_prefill_node_let_go(cluster: Any, say: Any) -> None:
    handing_off(cluster, say)
    cluster.report("d1", say.verified(1))


def waiting_after_a_failure(cluster: Any, say: Any) -> None:
    handing_off(cluster, say)
    cluster.lose("d1")
    cluster.report("p1", say.released(1))
    assert cluster.state() == {"queued": 1}


STATES: list[tuple[Callable[[Any, Any], None], list[str], int]] = [
    (queued, [], 0),
    (prefilling, ["p1 <- release 1", "d1 <- release 1"], 0),
    (handing_off, ["p1 <- release 1", "d1 <- release 1"], 1),
    (verified_before_the_prefill_node_let_go, ["p1 <- release 1", "d1 <- release 1"], 1),
    (decoding, ["d1 <- release 1"], 2),
    (waiting_after_a_failure, [], 1),
]


@pytest.mark.parametrize(
    ("reach", "released", "num_tokens"), STATES, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_satisfied_request_ends_well_and_frees_its_nodes(
    cluster: Any, say: Any, reach: Callable[[Any, Any], None], released: list[str], num_tokens: int
) -> None:
    reach(cluster, say)
    assert cluster.satisfy() == [*released, "1.1 finished: stop"]
    assert cluster.effects[-1].report.num_output_tokens == num_tokens
    counters = cluster.core.status(0.0).counters
    assert (counters.num_finished, counters.num_failed, counters.num_abandoned) == (1, 0, 0)
    for line in released:
        cluster.report(line[:2], say.released(1))
    cluster.assert_books_empty()


@pytest.mark.parametrize("again", ["satisfy", "cancel", "close_session"])
def test_what_the_caller_says_after_it_was_satisfied_changes_nothing(
    cluster: Any, say: Any, again: str
) -> None:
    decoding(cluster, say)
    cluster.satisfy()
    assert getattr(cluster, again)() == []
    counters = cluster.core.status(0.0).counters
    assert (counters.num_finished, counters.num_failed, counters.num_abandoned) == (1, 0, 0)


def test_tokens_that_cross_the_word_of_a_satisfied_caller_are_dropped(cluster: Any, say: Any) -> None:
    decoding(cluster, say)
    cluster.satisfy()
    assert cluster.tokens("d1", 1, 2, 12) == []
    assert cluster.report("d1", say.finished(1)) == []
    assert cluster.delivered[1, 1] == [10, 11]
    cluster.assert_books_empty()


def test_a_satisfied_request_makes_room_for_the_next(new_transcript: Any, say: Any) -> None:
    cluster = new_transcript()
    cluster.attach("p1")
    cluster.attach("d1", max_num_seqs=1)
    decoding(cluster, say)
    assert cluster.submit("next", stream_id=2) == []
    cluster.satisfy()
    lines = cluster.report("d1", say.released(1))
    assert lines == ["d1 <- reserve 2 [5, 6, 7]", "p1 <- prefill 2 [5, 6, 7] to d1:1"]


def test_satisfaction_with_an_unknown_request_is_no_event(cluster: Any) -> None:
    assert cluster.satisfy("nobody") == []
