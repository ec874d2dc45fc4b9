"""A decode step that begins before the tokens of the one before are known changes no token and leaks none."""

from __future__ import annotations

from random import Random

import pytest

from kvrelay.engine.sim.timing import SimTiming
from tests.engine.random_traffic import run_random_traffic


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_gives_the_tokens_of_an_engine_that_waits(
    build_sim, build_ahead, drive, request_of, prompt_of, seed
):
    random = Random(seed)
    requests = [
        request_of(
            prompt_of(random.randint(1, 60), random.randint(0, 3)),
            max_tokens=random.randint(1, 40),
            temperature=random.choice([0.0, 1.0]),
            seed=random.randint(0, 5),
            stop_token_ids=tuple(random.sample(range(211), 8)),
            ignore_eos=False,
        )
        for _ in range(60)
    ]
    expected = [drive(build_sim()).generate(request)[0] for request in requests]
    driver = drive(
        build_ahead(
            num_blocks=random.randint(24, 90),
            max_num_seqs=random.randint(1, 8),
            sim_timing=SimTiming(),
            itl_promise_ms=random.choice([None, 7.5, 0.001]),
        )
    )
    run_random_traffic(driver, requests, expected, random, eagerness=0.3)
    assert driver.engine._executor.num_ahead > 20


def test_a_lone_sequence_is_always_a_step_ahead(build_ahead, drive, request_of, prompt_of):
    engine = build_ahead()
    tokens = drive(engine).generate(request_of(prompt_of(10), max_tokens=20))[0]
    assert len(tokens) == 20
    assert engine._executor.num_ahead == 18, "all but the prefill's token and the first decode step's"


def test_what_a_step_under_way_writes_is_freed_after_it(build_ahead, drive, request_of, prompt_of):
    engine = build_ahead()
    driver = drive(engine)
    engine.submit(request_of(prompt_of(10), max_tokens=40), "a")
    for _ in range(3):
        driver.step()
    held = engine.load().num_held_blocks
    engine.release("a")
    assert engine.load().num_held_blocks == held > 0
    assert engine.has_work()
    driver.run()
    assert engine.load().num_held_blocks == 0


def test_a_reservation_joins_the_steps_that_are_under_way(
    build_sim, build_ahead, drive, request_of, prompt_of, move_kv
):
    source, target = drive(build_sim()), drive(build_ahead())
    requests = {f"k{index}": request_of(prompt_of(9 + index, index), max_tokens=30) for index in range(4)}
    expected = {key: drive(build_sim()).generate(request)[0] for key, request in requests.items()}
    for key, request in requests.items():
        source.engine.submit_prefill(request, key)
        source.run()
        ready = [item for item in source.ready if item.key == key]
        move_kv(source.engine, target.engine, key, request, ready)
        target.engine.start_decode(key, source.tokens(key)[0])
        for _ in range(3):
            target.step()
    target.run()
    assert not target.failures
    for key, tokens in expected.items():
        assert source.tokens(key) + target.tokens(key) == tokens


def test_waiting_requests_are_admitted_between(build_ahead, drive, request_of, prompt_of):
    driver = drive(build_ahead(max_num_seqs=2))
    for index in range(5):
        driver.engine.submit(request_of(prompt_of(8, index), max_tokens=6 + index), f"k{index}")
    driver.run()
    assert [len(driver.tokens(f"k{index}")) for index in range(5)] == [6, 7, 8, 9, 10]
