"""Who is let into the queue and who is refused, and what of that clients are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvrelay.core.errors import ConfigError
from kvrelay.core.service_terms import Priority, ServiceTerms
from kvrelay.router.admission_queue import Refusal
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.priorities import Priorities, PriorityClass

NewTranscript = Callable[..., Any]


def full_cluster(new_transcript: NewTranscript, **config: object) -> Any:
    """One sequence at a time; it is taken."""
    transcript = new_transcript(**config)
    transcript.attach("p1")
    transcript.attach("d1", max_num_seqs=1)
    transcript.submit("first", stream_id=10_000)
    return transcript


def ask(transcript: Any, number: int, **terms: Any) -> list[str]:
    lines: list[str] = transcript.submit(f"r{number}", stream_id=number, terms=ServiceTerms(**terms))
    return lines


def refused(transcript: Any) -> dict[tuple[str, str], int]:
    counts = transcript.core.status(transcript.now_s).queue.refused
    return {(key[0].value, key[1].value): number for key, number in counts.items()}


# ---- bounds ----------------------------------------------------------------------------------------


def test_each_class_has_a_bound_of_its_own(new_transcript: NewTranscript) -> None:
    priorities = Priorities(low=PriorityClass(max_queued=1))
    transcript = full_cluster(new_transcript, max_queued_requests=3, priorities=priorities)
    outcomes = [ask(transcript, number, priority=Priority.LOW) for number in range(3)]
    assert outcomes == [[], ["1.1 failed: OVERLOADED"], ["1.2 failed: OVERLOADED"]]
    for number in range(10, 13):
        assert ask(transcript, number, priority=Priority.HIGH) == []
    assert ask(transcript, 13, priority=Priority.HIGH) == ["1.13 failed: OVERLOADED"]
    assert "3 requests of priority high" in transcript.error().message
    assert refused(transcript) == {("low", "full"): 2, ("high", "full"): 1}


def test_one_tenant_leaves_room_for_others_and_others_leave_room_for_the_next(
    new_transcript: NewTranscript,
) -> None:
    transcript = full_cluster(new_transcript, max_queued_requests=20, max_tenant_share=0.5)
    number = 0
    for tenant, expected in (("greedy", 10), ("second", 5), ("third", 3)):
        taken = 0
        while ask(transcript, number, tenant=tenant) == []:
            taken, number = taken + 1, number + 1
        number += 1
        assert abs(taken - expected) <= 1
        assert transcript.error().retry_after_s > 0
    assert refused(transcript) == {("normal", "tenant"): 3}


def test_who_names_no_tenant_may_fill_the_queue(new_transcript: NewTranscript) -> None:
    transcript = full_cluster(new_transcript, max_queued_requests=4)
    assert [ask(transcript, number) for number in range(4)] == [[]] * 4


def test_a_request_that_can_start_at_once_is_not_refused_because_others_wait(
    new_transcript: NewTranscript,
) -> None:
    transcript = full_cluster(new_transcript, max_queued_requests=1)
    transcript.attach("p8", "d8", model="other")
    assert ask(transcript, 1) == []
    assert len(transcript.submit("goes", stream_id=2, model="other")) == 2


# ---- order -----------------------------------------------------------------------------------------


def test_a_greedy_tenant_does_not_hold_up_the_others(new_transcript: NewTranscript, say: Any) -> None:
    transcript = full_cluster(new_transcript)
    for number in range(8):
        ask(transcript, number, tenant="greedy")
    transcript.submit("modest", stream_id=99, prompt=(99,), terms=ServiceTerms(tenant="modest"))
    started = []
    for attempt in range(1, 4):
        transcript.report("p1", say.finished(attempt), tokens=say.batch((attempt, 0, (10,))))
        started += [line for line in transcript.report("d1", say.released(attempt)) if "reserve" in line]
    assert "[99]" in started[1]


def test_a_higher_class_starts_before_one_that_came_earlier(new_transcript: NewTranscript, say: Any) -> None:
    transcript = full_cluster(new_transcript)
    low = transcript.submit("low", stream_id=1, prompt=(1,), terms=ServiceTerms(Priority.LOW))
    high = transcript.submit("high", stream_id=2, prompt=(2,), terms=ServiceTerms(Priority.HIGH))
    assert low == high == []
    transcript.report("p1", say.finished(1), tokens=say.batch((1, 0, (10,))))
    assert transcript.report("d1", say.released(1))[0] == "d1 <- reserve 2 [2]"


# ---- deadlines -------------------------------------------------------------------------------------


def serve_some(transcript: Any, say: Any, compute_s: float, number: int = 30) -> None:
    """Prefills of three tokens that take so long each: the core learns."""
    for _ in range(number):
        attempt = transcript.num_attempts() + 1
        transcript.submit(f"t{attempt}", stream_id=5000 + attempt, max_tokens=1)
        transcript.now_s += compute_s
        transcript.report(
            "p1",
            say.prefilled(attempt, compute_s=compute_s),
            say.finished(attempt),
            tokens=say.batch((attempt, 0, (10,))),
        )
        transcript.report("d1", say.released(attempt))


def test_what_is_too_late_even_if_it_started_now_is_refused_at_once_and_says_so(
    new_transcript: NewTranscript, say: Any
) -> None:
    transcript = new_transcript()
    transcript.attach("p1", "d1")
    serve_some(transcript, say, compute_s=1.0)
    assert ask(transcript, 1, ttft_timeout_s=0.2) == ["1.1 failed: DEADLINE_EXCEEDED"]
    assert len(ask(transcript, 2, ttft_timeout_s=2.0)) == 2
    assert refused(transcript) == {("normal", "deadline"): 1}


def test_before_anything_was_learned_nothing_is_refused_for_its_deadline(cluster: Any) -> None:
    assert len(ask(cluster, 1, ttft_timeout_s=1e-6)) == 2


def test_what_waits_is_dropped_when_it_can_no_longer_be_in_time_and_no_work_is_done_for_it(
    new_transcript: NewTranscript, say: Any
) -> None:
    transcript = new_transcript()
    transcript.attach("p1")
    transcript.attach("d1", max_num_seqs=1)
    serve_some(transcript, say, compute_s=0.1)
    transcript.submit("runs", stream_id=1)
    assert ask(transcript, 2, ttft_timeout_s=1.0) == []
    begun_s = transcript.now_s
    assert transcript.tick(begun_s + 0.8) == []
    assert transcript.tick(begun_s + 1.0) == ["1.2 failed: OVERLOADED"]
    assert transcript.error().retry_after_s > 0
    assert refused(transcript) == {("normal", "dropped"): 1}


def test_a_first_token_that_is_late_on_its_node_does_not_end_the_request(cluster: Any) -> None:
    ask(cluster, 1, ttft_timeout_s=0.5)
    assert cluster.tick(3.0) == []
    assert cluster.first_token(1) == ["1.1 += 10"]


class Overload:
    """A cluster that serves a request a second, and is asked for two, each wanted within six seconds."""

    def __init__(self, transcript: Any, say: Any) -> None:
        self.transcript, self.say = transcript, say
        transcript.attach("p1")
        transcript.attach("d1", max_num_seqs=1)
        serve_some(transcript, say, compute_s=1.0)
        transcript.submit("begins", stream_id=1, max_tokens=1)
        self.num_asked = 0

    def ask(self, ttft_timeout_s: float = 6.0, tenant: str = "") -> list[str]:
        """A request of the next stream from 100 on; one is as good as all others."""
        self.num_asked += 1
        number = 100 + self.num_asked
        terms = ServiceTerms(tenant=tenant, ttft_timeout_s=ttft_timeout_s)
        lines: list[str] = self.transcript.submit(f"o{number}", stream_id=number, max_tokens=1, terms=terms)
        return lines

    def serve_one(self) -> None:
        """A second passes."""
        transcript, say = self.transcript, self.say
        transcript.now_s += 1.0
        transcript.tick(transcript.now_s)
        attempt = transcript.num_attempts()
        done = say.prefilled(attempt, compute_s=1.0), say.finished(attempt)
        transcript.report("p1", *done, tokens=say.batch((attempt, 0, (10,))))
        transcript.report("d1", say.released(attempt))

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.ask()
            self.ask()
            self.serve_one()


@pytest.fixture
def overload(new_transcript: NewTranscript, say: Any) -> Callable[..., Overload]:
    return lambda **config: Overload(new_transcript(growth_tokens=0, **config), say)


def refused_and_served(cluster: Any, seconds: int) -> tuple[int, int, int]:
    """Refused at once, refused later, and served, while it runs for so long."""
    transcript = cluster.transcript
    before, finished = refused(transcript), transcript.core.status(0.0).counters.num_finished
    cluster.run(seconds)
    after = refused(transcript)
    at_once, later = (
        after.get(("normal", reason), 0) - before.get(("normal", reason), 0)
        for reason in ("deadline", "dropped")
    )
    return at_once, later, transcript.core.status(0.0).counters.num_finished - finished


def test_under_a_lasting_overload_the_nodes_are_never_idle_and_half_is_refused(overload: Any) -> None:
    cluster = overload(trial_share=0.0)
    cluster.run(60)
    at_once, later, served = refused_and_served(cluster, 40)
    assert served == 40
    assert 38 <= at_once + later <= 42
    assert at_once > 10


def test_the_chance_that_is_asked_for_decides_how_much_is_refused_at_once(overload: Any) -> None:
    shares = []
    for min_chance in (0.1, 0.9):
        cluster = overload(trial_share=0.0, min_chance=min_chance)
        cluster.run(100)
        at_once, later, _ = refused_and_served(cluster, 40)
        shares.append(at_once / (at_once + later))
    assert shares[1] > 0.75
    assert shares[0] < shares[1]


def test_who_is_refused_for_its_deadline_is_told_when_to_come_back(overload: Any) -> None:
    cluster = overload(trial_share=0.0)
    cluster.run(40)
    while cluster.ask() == []:
        pass
    assert 4.0 < cluster.transcript.error().retry_after_s < 10.0
    assert "would wait for about" in cluster.transcript.error().message
    assert cluster.ask(ttft_timeout_s=30.0) == []


def test_one_tenants_overload_does_not_make_anothers_request_late(overload: Any) -> None:
    cluster = overload(trial_share=0.0)
    cluster.run(40)
    while cluster.ask() == []:
        pass
    assert cluster.ask(ttft_timeout_s=3.5, tenant="modest") == []
    for _ in range(3):
        cluster.serve_one()
    assert (1, 100 + cluster.num_asked) in cluster.transcript.delivered


def test_trials_are_served_and_tell_that_refusing_them_would_have_been_right(overload: Any) -> None:
    cluster = overload(trial_share=1.0)
    cluster.run(60)
    queue = cluster.transcript.core.status(0.0).queue
    assert queue.num_trials > 20
    assert queue.num_trials_in_time == 0
    assert ("normal", "deadline") not in refused(cluster.transcript)


def test_a_trial_that_is_in_time_after_all_shows_a_false_refusal(overload: Any) -> None:
    cluster = overload(trial_share=1.0)
    cluster.run(40)
    waiting = cluster.num_asked
    trials = cluster.transcript.core.status(0.0).queue.num_trials
    cluster.ask()
    assert cluster.transcript.core.status(0.0).queue.num_trials == trials + 1
    for number in range(101, 101 + waiting):
        cluster.transcript.cancel(f"o{number}")
    cluster.transcript.report("p1", cluster.say.released(cluster.transcript.num_attempts()))
    cluster.transcript.report("d1", cluster.say.released(cluster.transcript.num_attempts()))
    cluster.serve_one()
    assert cluster.transcript.core.status(0.0).queue.num_trials_in_time == 1


# ---- configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_tenant_share", 1.5), ("trial_share", -0.1), ("min_chance", float("nan")), ("trial_share", True)],
)
def test_a_share_out_of_range_is_a_fault_that_names_it(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=setting):
        RouterCoreConfig(**{setting: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [{"weight": 0.0}, {"weight": float("inf")}, {"max_queued": 0}])
def test_a_class_without_weight_or_room_is_a_fault_that_names_it(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        PriorityClass(**values)


def test_every_reason_of_a_refusal_is_shown(cluster: Any) -> None:
    status = cluster.core.status(0.0)
    assert set(status.lengths) == set(Priority)
    assert {reason.value for reason in Refusal} == {"full", "tenant", "deadline", "dropped", "timeout"}
