"""The fit of a step's duration: what it recovers, what does not throw it off, and what it allows."""

from __future__ import annotations

from random import Random

import pytest

from kvrelay.engine.step_cost import FIRST_CHUNK_TOKENS, StepCost, StepShape

TOKEN_S, KEY_S, ROW_S, CONTEXT_S, BASE_S = 2.4e-5, 1.1e-9, 2.0e-5, 4.0e-8, 0.0065


def shape_of(num_tokens: int, start: int = 0, num_rows: int = 8, context: int = 1000) -> StepShape:
    shape = StepShape()
    for _ in range(num_rows):
        shape.add(context, 1, is_prefill=False)
    if num_tokens:
        shape.add(start, num_tokens, is_prefill=True)
    return shape


def true_s(shape: StepShape) -> float:
    return (
        BASE_S
        + TOKEN_S * shape.num_prefill_tokens
        + KEY_S * shape.num_attended_keys
        + ROW_S * shape.num_decode_rows
        + CONTEXT_S * shape.num_decode_context_tokens
    )


def learnt(num_steps: int = 400, noise: float = 0.03, seed: int = 1, within_s: float = 0.04) -> StepCost:
    """A fit of steps of many shapes."""
    random, cost = Random(seed), StepCost(within_s)
    for _ in range(num_steps):
        shape = shape_of(
            random.randint(16, 2048),
            random.randint(0, 16_000),
            random.randint(1, 64),
            random.randint(1, 9000),
        )
        cost.observe(shape, true_s(shape) * random.gauss(1.0, noise))
    return cost


def test_shape_counts_what_each_token_attends_to():
    shape = StepShape()
    shape.add(100, 10, is_prefill=True)
    shape.add(40, 1, is_prefill=False)
    shape.add(50, 1, is_prefill=False)
    assert (shape.num_prefill_tokens, shape.num_attended_keys) == (10, 10 * 105)
    assert (shape.num_decode_rows, shape.num_decode_context_tokens) == (2, 90)
    assert shape.is_mixed
    assert not shape_of(0).is_mixed
    assert not shape_of(10, num_rows=0).is_mixed


@pytest.mark.parametrize("seed", range(5))
def test_known_coefficients_are_found_in_noisy_steps(seed):
    token_s, key_s, *_ = learnt(seed=seed).coefficients_s
    assert token_s == pytest.approx(TOKEN_S, rel=0.12)
    assert key_s == pytest.approx(KEY_S, rel=0.12)


@pytest.mark.parametrize("seed", range(5))
def test_steps_of_shapes_never_seen_are_predicted(seed):
    cost = learnt(seed=seed)
    for shape in (shape_of(64), shape_of(1000, 5000, 30), shape_of(2000, 10_000, 2), shape_of(3000, 0, 100)):
        assert cost.predict_s(shape) == pytest.approx(true_s(shape), rel=0.08)


def test_no_coefficient_is_ever_negative():
    random, cost = Random(3), StepCost(0.05)
    for _ in range(300):  # time has nothing to do with the shape
        cost.observe(shape_of(random.randint(1, 500), random.randint(0, 5000)), random.uniform(0.001, 0.1))
        assert min(cost.coefficients_s) >= 0.0


@pytest.mark.parametrize("num_steps", [0, 1, 5, 200])
def test_a_pause_of_two_seconds_does_not_ruin_the_fit(num_steps):
    cost, calm = learnt(num_steps, within_s=0.025), learnt(within_s=0.025)
    cost.observe(shape_of(64), 2.0)
    random = Random(9)
    for _ in range(15):
        shape = shape_of(random.randint(64, 600), random.randint(0, 4000))
        cost.observe(shape, true_s(shape))
    allowed = cost.max_prefill_tokens(shape_of(0), 0)
    assert allowed == pytest.approx(calm.max_prefill_tokens(shape_of(0), 0), rel=0.15)


def test_a_device_that_gets_slower_and_faster_again_is_followed():
    cost = learnt(within_s=0.050)
    usual = cost.max_prefill_tokens(shape_of(0), 0)
    for factor in (2.0, 1.0):
        for _ in range(60):
            num_tokens = max(16, cost.max_prefill_tokens(shape_of(0), 0))
            cost.observe(shape_of(num_tokens), factor * true_s(shape_of(num_tokens)))
        assert factor * true_s(shape_of(num_tokens)) == pytest.approx(0.050, rel=0.05)
    assert num_tokens == pytest.approx(usual, rel=0.1)


def test_what_is_allowed_fills_the_time_and_no_more():
    cost = learnt()
    for start in (0, 100, 4000, 12_000):
        shape = shape_of(0)
        num_tokens = cost.max_prefill_tokens(shape, start)
        assert cost.predict_s(shape_of(num_tokens, start)) <= 0.040
        assert cost.predict_s(shape_of(num_tokens + 2, start)) > 0.040


def test_what_a_prompt_has_taken_is_not_given_to_the_next():
    cost = learnt()
    first = cost.max_prefill_tokens(shape_of(0), 0)
    half = cost.max_prefill_tokens(shape_of(first // 2), 0)
    assert half == pytest.approx(first / 2, rel=0.1)
    assert cost.max_prefill_tokens(shape_of(first + 1), 0) == 0


def test_more_time_allows_more_and_more_work_less():
    allowed = [
        learnt(200, within_s=ms / 1e3).max_prefill_tokens(shape_of(0), 0) for ms in (1, 5, 10, 20, 40, 60, 90)
    ]
    assert allowed == sorted(allowed)
    assert (allowed[0], allowed[1]) == (0, 0)
    assert allowed[2] > 0
    cost = learnt()
    for shapes in (
        [(shape_of(0, num_rows=rows), 0) for rows in range(1, 300, 20)],
        [(shape_of(0, context=context), 0) for context in range(1, 50_000, 1000)],
        [(shape_of(0), start) for start in range(0, 50_000, 1000)],
    ):
        less = [cost.max_prefill_tokens(shape, start) for shape, start in shapes]
        assert less == sorted(less, reverse=True)
        assert less[-1] < less[0]


def test_the_first_chunk_is_small_and_no_step_more_than_twice_the_largest():
    cost, largest = StepCost(0.050), FIRST_CHUNK_TOKENS // 2
    for _ in range(20):
        num_tokens = cost.max_prefill_tokens(shape_of(0), 0)
        assert 0 < num_tokens <= 2 * largest
        cost.observe(shape_of(num_tokens), true_s(shape_of(num_tokens)))
        largest = max(largest, num_tokens)
    assert true_s(shape_of(num_tokens)) == pytest.approx(0.050, rel=0.1)


def test_blocks_of_one_size_do_not_hide_what_a_token_costs_for_ever():
    limit_s = 0.0135
    cost = StepCost(limit_s)
    for _ in range(100):  # all the first steps take one block: what is its tokens' and what the base's?
        allowed = cost.max_prefill_tokens(shape_of(0, num_rows=64), 0)
        shape = shape_of(max(16, allowed // 16 * 16), num_rows=64)
        cost.observe(shape, true_s(shape))
    assert 0.9 * limit_s < true_s(shape) <= limit_s


def test_steps_that_only_decode_or_only_prefill_teach_nothing():
    cost = StepCost(0.001)
    cost.observe(shape_of(0), 5.0)
    cost.observe(shape_of(4096, num_rows=0), 5.0)
    assert cost.coefficients_s == (0.0, 0.0, 0.0, 0.0, 0.0)
    assert cost.max_prefill_tokens(shape_of(0), 0) == FIRST_CHUNK_TOKENS


def test_a_clock_that_stands_still_is_survived():
    cost = StepCost(0.001)
    for _ in range(50):
        cost.observe(shape_of(FIRST_CHUNK_TOKENS), 0.0)
    assert cost.max_prefill_tokens(shape_of(0), 0) == 2 * FIRST_CHUNK_TOKENS
