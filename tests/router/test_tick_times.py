"""When time alone ends a request, and when the core says that it is to be told of the time."""

import math

from .conftest import Transcript


def test_each_of_many_deadlines_is_met_and_ticks_are_asked_for_by_the_next(cluster: Transcript) -> None:
    for name, stream_id, deadline_s in (("late", 1, 9.0), ("soon", 2, 3.0), ("later", 3, 5.0)):
        cluster.submit(name, stream_id=stream_id, deadline_s=deadline_s, max_tokens=8)
    assert cluster.core.next_tick_s(1.0) == 3.0
    assert cluster.tick(2.9) == []
    assert "1.2 failed: DEADLINE_EXCEEDED" in cluster.tick(3.0)
    assert cluster.core.next_tick_s(3.0) == 5.0
    assert "1.3 failed: DEADLINE_EXCEEDED" in cluster.tick(5.1)
    assert "1.1 failed: DEADLINE_EXCEEDED" in cluster.tick(9.0)
    assert cluster.core.next_tick_s(9.0) == math.inf


def test_a_queued_request_asks_for_the_next_tick_at_once() -> None:
    cluster = Transcript()
    cluster.attach("p1", "d1", max_num_seqs=1)
    cluster.submit("first", stream_id=1)
    assert cluster.core.next_tick_s(1.0) > 100.0
    cluster.submit("second", stream_id=2)
    assert cluster.core.next_tick_s(1.0) == 1.0
