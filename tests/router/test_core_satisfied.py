"""A client that has all it wants ends its request as finished, in whatever state that is."""

from collections.abc import Callable
from typing import Any

import pytest

FINISHED = "1.1 finished: stop"


def queued(cluster: Any) -> None:
    cluster.lose("d1")
    cluster.submit()
    assert cluster.state() == {"queued": 1}


def prefilling(cluster: Any) -> None:
    cluster.submit()
    assert cluster.state() == {"prefilling": 1}


def handing_off(cluster: Any) -> None:
    cluster.submit()
    cluster.first_token()
    assert cluster.state() == {"handing_off": 1}


def decoding(cluster: Any) -> None:
    cluster.submit()
    cluster.first_token()
    cluster.verify()
    assert cluster.state() == {"decoding": 1}


@pytest.mark.parametrize(
    ("reach", "released", "num_tokens"),
    [(queued, "", 0), (prefilling, "pd", 0), (handing_off, "pd", 1), (decoding, "d", 1)],
)
def test_it_is_finished_at_once_and_every_holder_is_told_to_let_go(
    cluster: Any, say: Any, reach: Callable[[Any], None], released: str, num_tokens: int
) -> None:
    reach(cluster)
    assert cluster.satisfy() == [*(f"{role}1 <- release 1" for role in released), FINISHED]
    assert cluster.effects[-1].report.num_output_tokens == num_tokens
    for role in released:
        cluster.report(f"{role}1", say.released(1))
    cluster.assert_books_empty()
    counters = cluster.core.status(cluster.now_s).counters
    assert (counters.num_finished, counters.num_failed, counters.num_abandoned) == (1, 0, 0)


def test_what_the_nodes_still_say_is_not_delivered(cluster: Any, say: Any) -> None:
    decoding(cluster)
    cluster.tokens("d1", 1, 1, 11)
    cluster.satisfy()
    assert cluster.tokens("d1", 1, 2, 12) == []
    assert cluster.report("d1", say.finished(1)) == []
    assert cluster.delivered[1, 1] == [10, 11]
    cluster.assert_books_empty()


def test_the_id_is_free_again_and_a_second_word_says_nothing(cluster: Any) -> None:
    decoding(cluster)
    cluster.satisfy()
    assert cluster.satisfy() == cluster.satisfy("unknown") == cluster.cancel() == []
    assert cluster.submit() == ["d1 <- reserve 2 [5, 6, 7]", "p1 <- prefill 2 [5, 6, 7] to d1:1"]


def test_room_that_it_leaves_goes_to_who_waits(new_transcript: Any, say: Any) -> None:
    cluster = new_transcript()
    cluster.attach("p1", max_num_seqs=1)
    cluster.attach("d1", max_num_seqs=1)
    cluster.submit()
    cluster.first_token()
    cluster.verify()
    assert cluster.submit("waits", stream_id=2) == []
    assert cluster.satisfy() == ["d1 <- release 1", FINISHED]
    assert cluster.report("d1", say.released(1))[0] == "d1 <- reserve 2 [5, 6, 7]"
