"""What is foretold of a model's nodes: steps, output lengths, room, waits."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.router.decode_pace import DecodePace
from kvrelay.router.decode_timeline import DecodeTimeline
from kvrelay.router.drain_rate import DrainRate
from kvrelay.router.output_lengths import OutputLengths

# ---- steps -----------------------------------------------------------------------------------------


def test_a_step_is_learned_by_what_runs_beside_it() -> None:
    def true_step_s(batch: float, context: float) -> float:
        return 0.02 + 0.001 * batch + 2e-6 * context

    pace, rng, now_s, serial = DecodePace(), Random(3), 0.0, 0
    for _ in range(250):
        batch, context = rng.randint(1, 32), rng.randint(50, 500)
        serials = range(serial, serial + batch)
        serial += batch
        for one in serials:
            pace.begin(one, context, now_s)
        now_s += 20 * true_step_s(batch, batch * context)
        for one in serials:
            pace.end(one, now_s, context + 20)
    assert pace.num_streams == pace.num_context_tokens == 0
    for batch, context in ((8, 2000), (16, 4000), (30, 9000)):
        assert pace.step_s(batch, context) == pytest.approx(true_step_s(batch, context), rel=0.1)


def test_what_runs_is_spread_over_the_nodes() -> None:
    pace = DecodePace()
    alone_s = pace.step_s(8, 4000)
    pace.num_nodes = 4
    assert pace.step_s(32, 16_000) == pytest.approx(alone_s)


def test_an_answer_that_was_cut_off_teaches_nothing() -> None:
    pace = DecodePace()
    pace.begin(1, 10, 0.0)
    pace.end(1, 100.0)
    pace.end(1, 100.0, 50)
    assert pace.num_observed == 0


# ---- output lengths --------------------------------------------------------------------------------


def request(**sampling: object) -> TokenRequest:
    return TokenRequest((5,), 1, SamplingParams(**sampling))  # type: ignore[arg-type]


def test_answers_are_expected_as_long_as_those_seen_and_may_be_shorter() -> None:
    lengths, rng = OutputLengths(), Random(1)
    assert lengths.expected(request(max_tokens=100)) == 100
    assert lengths.at_least(request(max_tokens=100)) == 1
    for _ in range(3000):
        lengths.observe(request(max_tokens=100), rng.randint(20, 60))
    assert lengths.expected(request(max_tokens=80)) == pytest.approx(32, rel=0.15)
    assert 15 <= lengths.at_least(request(max_tokens=80)) <= 24


def test_who_allows_as_much_as_the_context_holds_is_not_expected_to_get_it() -> None:
    lengths = OutputLengths()
    for _ in range(300):
        lengths.observe(request(max_tokens=8), 8)
    assert lengths.expected(request(max_tokens=8)) == 8
    assert lengths.at_least(request(max_tokens=100_000)) <= lengths.expected(request(max_tokens=100_000)) < 20


def test_who_asks_for_a_length_gets_it_foretold() -> None:
    lengths = OutputLengths()
    for _ in range(100):
        lengths.observe(request(max_tokens=100), 5)
    exact = request(max_tokens=100, ignore_eos=True)
    assert lengths.expected(exact) == lengths.at_least(exact) == 100
    assert lengths.at_least(request(max_tokens=100, min_tokens=30)) == 30


# ---- room ------------------------------------------------------------------------------------------


def test_room_is_free_when_enough_of_what_runs_has_ended() -> None:
    timeline = DecodeTimeline()
    for serial, end_s in enumerate((10.0, 20.0, 30.0)):
        timeline.add(serial, 100, end_s, 0.0)
    assert timeline.free_in_s(0, 0, 0.0) == 0.0
    assert timeline.free_in_s(1, 0, 0.0) == pytest.approx(10.0, abs=0.25)
    assert timeline.free_in_s(1, 150, 0.0) == pytest.approx(20.0, abs=0.25)
    assert timeline.free_in_s(4, 0, 0.0) == math.inf
    assert timeline.left_at(25.0, 0.0) == (1, 100)
    timeline.remove(0)
    assert timeline.free_in_s(1, 0, 0.0) == pytest.approx(20.0, abs=0.25)


def test_what_should_have_ended_is_taken_to_end_now_and_what_is_far_away_in_two_minutes() -> None:
    timeline = DecodeTimeline()
    timeline.add(1, 100, 5.0, 0.0)
    timeline.add(2, 100, 1e9, 0.0)
    assert timeline.free_in_s(1, 0, 60.0) == 0.0
    assert timeline.free_in_s(2, 0, 60.0) <= 128.0
    assert timeline.free_in_s(2, 0, 1e6) == 0.0


MOVES = st.lists(
    st.tuples(st.booleans(), st.integers(0, 9), st.floats(0, 300), st.floats(0, 200)), max_size=60
)


@given(MOVES)
def test_all_that_runs_is_counted_whatever_time_it_is(
    moves: list[tuple[bool, int, float, float]],
) -> None:
    timeline, inside, now_s = DecodeTimeline(), {}, 0.0
    for adds, serial, length_s, passed_s in moves:
        now_s += passed_s
        if adds and serial not in inside:
            inside[serial] = 10 + serial
            timeline.add(serial, 10 + serial, now_s + length_s, now_s)
        else:
            inside.pop(serial, None)
            timeline.remove(serial)
        assert (timeline.num_running, timeline.num_tokens) == (len(inside), sum(inside.values()))
        assert timeline.left_at(now_s, now_s) == (len(inside), sum(inside.values()))
        assert timeline.left_at(now_s + 1000.0, now_s) == (0, 0)
        assert (timeline.free_in_s(len(inside), 0, now_s) < math.inf) or not inside


# ---- waits -----------------------------------------------------------------------------------------


def drained(seconds_each: float, num_nodes: int = 2, low: float = 0.1) -> tuple[DrainRate, float]:
    """One second of work is started every so often."""
    drain, now_s = DrainRate(low), 0.0
    drain.note_waiting(num_nodes, now_s)
    for _ in range(100):
        now_s += seconds_each
        drain.note_waiting(num_nodes, now_s)
        drain.note_started(1.0)
    return drain, now_s


def test_a_wait_is_foretold_by_how_fast_the_queue_has_moved() -> None:
    drain, now_s = drained(0.5)
    assert drain.wait_s(10.0, 2, now_s) == pytest.approx(5.0)
    assert drain.wait_s(10.0, 4, now_s) == pytest.approx(2.5), "twice the nodes"
    assert drain.mean_start_s == pytest.approx(0.5)


def test_a_queue_that_stands_still_makes_waits_longer() -> None:
    drain, now_s = drained(0.5)
    assert drain.wait_s(10.0, 2, now_s + 32.0) > 1.5 * drain.wait_s(10.0, 2, now_s)


def test_time_in_which_nobody_waits_does_not_count() -> None:
    drain, now_s = drained(0.5)
    drain.note_empty()
    drain.note_waiting(2, now_s + 1000.0)
    assert drain.wait_s(10.0, 2, now_s + 1000.0) == pytest.approx(5.0)


def test_before_anything_has_started_no_wait_is_foretold() -> None:
    assert DrainRate(0.1).wait_s(1e6, 1, 5.0) == 0.0


def test_what_is_sure_of_a_wait_is_learned_by_size() -> None:
    drain, rng = drained(0.5)[0], Random(5)
    for _ in range(2000):
        drain.note_waited(rng.uniform(0.0, 1.0), 1.0, 0.1)
        drain.note_waited(rng.uniform(0.8, 1.2), 1.0, 8.0)
    assert drain.at_best_s(1.0, 0.1) == pytest.approx(0.1, abs=0.08)
    assert drain.at_best_s(1.0, 8.0) == pytest.approx(0.84, abs=0.1)
