"""Pairs that failed to pull from each other pause, longer each time, and are not remembered without bound."""

from kvrelay.core.ids import NodeId
from kvrelay.router.failed_pulls import FailedPulls

P1, P2, D1 = NodeId("p1"), NodeId("p2"), NodeId("d1")


def test_a_failure_pauses_that_pair_alone() -> None:
    pulls = FailedPulls()
    pulls.note(D1, P1, has_failed=True, now_s=0.0)
    assert pulls.pausing(D1, 1.0) == [P1]
    assert pulls.pausing(P2, 1.0) == []
    assert pulls.pausing(D1, 11.0) == []


def test_failures_in_a_row_pause_longer_and_a_pull_that_works_ends_that() -> None:
    pulls = FailedPulls()
    for _ in range(3):
        pulls.note(D1, P1, has_failed=True, now_s=0.0)
    assert pulls.pausing(D1, 39.0) == [P1]
    assert pulls.pausing(D1, 41.0) == []
    pulls.note(D1, P1, has_failed=False, now_s=41.0)
    pulls.note(D1, P1, has_failed=True, now_s=42.0)
    assert pulls.pausing(D1, 53.0) == []


def test_no_pause_grows_without_bound_however_often_a_pair_fails() -> None:
    pulls = FailedPulls()
    for _ in range(5000):
        pulls.note(D1, P1, has_failed=True, now_s=0.0)
    assert pulls.pausing(D1, 321.0) == []


def test_of_many_pairs_the_oldest_are_forgotten() -> None:
    pulls = FailedPulls()
    for number in range(1025):
        pulls.note(D1, NodeId(f"p{number}"), has_failed=True, now_s=0.0)
    paused = pulls.pausing(D1, 1.0)
    assert len(paused) == 1024
    assert NodeId("p0") not in paused


def test_a_node_that_comes_back_starts_anew() -> None:
    pulls = FailedPulls()
    pulls.note(D1, P1, has_failed=True, now_s=0.0)
    pulls.note(P2, D1, has_failed=True, now_s=0.0)
    pulls.forget(D1)
    assert pulls.pausing(D1, 1.0) == pulls.pausing(P2, 1.0) == []
