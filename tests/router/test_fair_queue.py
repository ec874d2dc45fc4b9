"""Who is next of those that wait: shares of classes and tenants, order within a tenant, what is ahead."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.core.service_terms import Priority, ServiceTerms
from kvrelay.router.fair_queue import FairQueue
from kvrelay.router.fair_share import FairShare
from kvrelay.router.priorities import Priorities, PriorityClass


@dataclass(frozen=True, slots=True, eq=False)
class Waiter:
    serial: int
    tenant: str = ""
    priority: Priority = Priority.NORMAL
    work_s: float = 1.0
    due_s: float = 0.0
    num_room_tokens: int = 100
    terms: ServiceTerms = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", ServiceTerms(self.priority, self.tenant))


Queue = FairQueue[Waiter]


def queue_of(*waiters: Waiter, priorities: Priorities | None = None) -> Queue:
    queue: Queue = FairQueue(priorities or Priorities())
    for waiter in waiters:
        queue.add(waiter)
    return queue


def serve(queue: Queue, waiter: Waiter) -> None:
    queue.charge(waiter.terms, waiter.work_s)
    queue.remove(waiter)


def serve_next(queue: Queue, number: int) -> list[Waiter]:
    """What is served if always the foremost is taken."""
    served = []
    for _ in range(number):
        served.append(next(iter(queue)))
        serve(queue, served[-1])
    return served


# ---- order -----------------------------------------------------------------------------------------


def test_one_tenants_requests_go_in_the_order_in_which_they_must_start() -> None:
    waiters = [Waiter(1, due_s=5.0), Waiter(2, due_s=3.0), Waiter(3, due_s=5.0), Waiter(4, due_s=1.0)]
    assert [waiter.serial for waiter in queue_of(*waiters)] == [4, 2, 1, 3]


def test_tenants_take_turns_however_many_requests_one_has() -> None:
    greedy = [Waiter(serial, "greedy") for serial in range(20)]
    queue = queue_of(*greedy, Waiter(100, "a"), Waiter(101, "a"), Waiter(102, "b"))
    assert [waiter.tenant for waiter in serve_next(queue, 6)] == ["greedy", "a", "b", "greedy", "a", "greedy"]


def test_turns_are_by_work_not_by_number() -> None:
    large = [Waiter(serial, "large", work_s=4.0) for serial in range(10)]
    small = [Waiter(100 + serial, "small", work_s=1.0) for serial in range(40)]
    served = Counter(waiter.tenant for waiter in serve_next(queue_of(*large, *small), 25))
    assert served == {"large": 5, "small": 20}


def test_classes_share_by_weight_and_the_lowest_is_not_starved() -> None:
    priorities = Priorities(high=PriorityClass(8.0), normal=PriorityClass(3.0), low=PriorityClass(1.0))
    waiters = [
        Waiter(serial, priority=priority)
        for serial, priority in enumerate(p for _ in range(100) for p in Priority)
    ]
    served = Counter(w.priority for w in serve_next(queue_of(*waiters, priorities=priorities), 120))
    assert served == {Priority.HIGH: 80, Priority.NORMAL: 30, Priority.LOW: 10}


def test_a_tenant_that_was_idle_has_saved_up_nothing() -> None:
    queue = queue_of(*[Waiter(serial, "old") for serial in range(100)], Waiter(500, "other"))
    serve_next(queue, 40)
    for serial in range(50):
        queue.add(Waiter(1000 + serial, "new"))
    served = Counter(waiter.tenant for waiter in serve_next(queue, 20))
    assert served["old"] == served["new"] == 10


def test_what_a_tenant_was_served_beyond_others_is_remembered_while_others_wait() -> None:
    queue = queue_of(Waiter(1, "a", work_s=10.0), *[Waiter(10 + number, "b") for number in range(30)])
    serve(queue, next(waiter for waiter in queue if waiter.tenant == "a"))
    queue.add(Waiter(2, "a", work_s=10.0))
    assert {waiter.tenant for waiter in serve_next(queue, 9)} == {"b"}


def test_work_that_was_less_than_expected_is_given_back() -> None:
    queue = queue_of(*[Waiter(serial, tenant) for serial, tenant in enumerate("abababab")])
    serve_next(queue, 4)
    queue.charge(ServiceTerms(tenant="b"), -1.0)
    assert [waiter.tenant for waiter in serve_next(queue, 3)] == ["b", "a", "b"]


def test_continuations_come_before_all_and_the_last_one_added_first() -> None:
    queue = queue_of(Waiter(1, priority=Priority.HIGH))
    queue.add_first(Waiter(5, priority=Priority.LOW))
    queue.add_first(Waiter(4, priority=Priority.LOW))
    assert [waiter.serial for waiter in queue] == [4, 5, 1]


def test_a_policy_sees_all_of_a_tenant_that_is_alone_and_only_a_few_requests_of_several() -> None:
    greedy = [Waiter(serial, "greedy") for serial in range(100)]
    assert len(list(queue_of(*greedy))) == 100
    seen = Counter(waiter.tenant for waiter in queue_of(*greedy, Waiter(500, "a")))
    assert seen["a"] == 1
    assert 1 < seen["greedy"] <= 6


def test_a_policy_sees_each_class_as_a_whole_that_whose_turn_it_is_first() -> None:
    queue = queue_of(*[Waiter(serial, priority=p) for serial, p in enumerate([*Priority] * 3)])
    serve(queue, next(iter(queue)))
    classes = [waiter.priority for waiter in queue]
    assert classes == [Priority.NORMAL] * 3 + [Priority.LOW] * 3 + [Priority.HIGH] * 2


# ---- what is ahead ---------------------------------------------------------------------------------


def test_what_is_ahead_of_a_tenants_next_request_is_its_own_and_as_much_of_each_other() -> None:
    waiters = [Waiter(serial, "greedy") for serial in range(50)]
    waiters += [Waiter(100 + serial, "a") for serial in range(3)]
    queue = queue_of(*waiters)
    assert queue.work_ahead_s(Waiter(200, "a")) == pytest.approx(3.0 + 3.0)
    assert queue.work_ahead_s(Waiter(200, "greedy")) == pytest.approx(50.0 + 3.0)
    assert queue.work_ahead_s(Waiter(200, "new")) == 0.0


def test_of_a_class_of_more_weight_more_is_ahead_of_less_weight_less() -> None:
    priorities = Priorities(high=PriorityClass(4.0), normal=PriorityClass(1.0), low=PriorityClass(0.5))
    waiters = [Waiter(n * 3 + k, priority=p) for n in range(40) for k, p in enumerate(Priority)]
    queue = queue_of(*waiters[:120], priorities=priorities)
    number = sum(waiter.priority is Priority.NORMAL for waiter in waiters)
    assert queue.work_ahead_s(Waiter(999, due_s=1.0)) == pytest.approx(number + 40 + number / 2)


SPECS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(Priority), st.floats(0.1, 5.0)), max_size=30
)


@given(SPECS)
def test_work_ahead_is_what_is_served_before_it_if_nobody_comes(
    specs: list[tuple[str, Priority, float]],
) -> None:
    waiters = [Waiter(serial, *spec) for serial, spec in enumerate(specs)]
    last = Waiter(1000, "a", Priority.NORMAL)
    queue = queue_of(*waiters, last)
    foretold_s, before_s = queue.work_ahead_s(last), 0.0
    largest_s = max((waiter.work_s for waiter in waiters), default=0.0)
    while (served := next(iter(queue))) is not last:
        before_s += served.work_s
        serve(queue, served)
    # Each of the other tenants and classes may be a request ahead, or behind.
    assert abs(before_s - foretold_s) <= 9 * largest_s + 1e-6


# ---- invariants ------------------------------------------------------------------------------------

MOVES = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "first", "serve", "cancel", "pick"]),
        st.sampled_from(["", "a", "b", "c"]),
        st.sampled_from(Priority),
        st.floats(0.01, 10.0),
        st.floats(0.0, 100.0),
        st.integers(0, 100),
    ),
    max_size=80,
)


@given(MOVES)
def test_nothing_is_lost_doubled_or_miscounted(
    moves: list[tuple[str, str, Priority, float, float, int]],
) -> None:
    queue: Queue = FairQueue(Priorities())
    inside: dict[int, Waiter] = {}
    first: set[int] = set()
    for serial, (move, tenant, priority, work_s, due_s, choice) in enumerate(moves):
        if move in ("add", "first"):
            waiter = Waiter(serial, tenant, priority, work_s, due_s)
            inside[serial] = waiter
            (queue.add if move == "add" else queue.add_first)(waiter)
            first |= {serial} if move == "first" else set()
        elif inside:
            if move == "cancel":
                waiter = list(inside.values())[choice % len(inside)]
            else:
                seen = list(islice(queue, 64))
                waiter = seen[0 if move == "serve" else choice % len(seen)]
                if waiter.serial not in queue.front:
                    queue.charge(waiter.terms, waiter.work_s)
            queue.remove(waiter)
            del inside[waiter.serial]
        _check(queue, inside, first & set(inside))


def _check(queue: Queue, inside: dict[int, Waiter], first: set[int]) -> None:
    assert sorted(waiter.serial for waiter in queue.all()) == sorted(inside)
    assert len(queue) == len(inside)
    assert all(waiter in queue for waiter in inside.values())
    seen = [waiter.serial for waiter in queue]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(inside)
    assert bool(seen) == bool(inside), "somebody is always next"
    assert queue.total_work_s == pytest.approx(sum(w.work_s for w in inside.values()), abs=1e-6)
    assert queue.total_tokens == 100 * len(inside)
    for priority in Priority:
        expected = sum(w.priority is priority and w.serial not in first for w in inside.values())
        assert queue.num_of_class(priority) == expected
    for waiter in inside.values():
        assert -1e-6 <= queue.work_ahead_s(waiter) <= queue.total_work_s + 1e-6


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.1, 3.0)), min_size=60, max_size=120),
    st.lists(st.integers(0, 63), min_size=30, max_size=30),
)
def test_no_tenant_that_waits_falls_behind_another_by_more_than_a_bound_whatever_a_policy_picks(
    specs: list[tuple[str, float]], choices: list[int]
) -> None:
    waiters = [Waiter(serial, tenant, work_s=work_s) for serial, (tenant, work_s) in enumerate(specs)]
    queue = queue_of(*waiters)
    served_s: Counter[str] = Counter()
    largest_s = max(work_s for _, work_s in specs)
    for choice in choices:
        seen = list(islice(queue, 64))
        waiter = seen[choice % len(seen)]
        serve(queue, waiter)
        served_s[waiter.tenant] += waiter.work_s
        waiting = {waiter.tenant for waiter in queue.all()}
        if waiting == {"a", "b", "c"}:
            most, least = max(served_s[t] for t in waiting), min(served_s[t] for t in waiting)
            assert most - least <= 4.0 * largest_s + largest_s + 1e-6
        else:
            break


def test_parties_that_do_not_wait_are_remembered_only_within_a_bound() -> None:
    share: FairShare[Waiter] = FairShare()
    share.begin("stays")
    for number in range(5000):
        share.begin(f"t{number}")
        share.charge(f"t{number}", 1.0)
        share.end(f"t{number}")
    assert len(share._ahead) <= 1024
    share.end("stays")
    assert not share._ahead
