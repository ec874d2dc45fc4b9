"""Random traffic against the scheduler, through the simulated engine: no leak, and the right tokens."""

from __future__ import annotations

from random import Random

import pytest

from kvrelay.core.errors import Overloaded
from kvrelay.engine.sim.timing import SimTiming
from tests.engine.random_traffic import run_random_traffic

PROMISES_MS = (None, 7.5, 0.001)
"""None, one that a step with a part of the budget keeps, and one that no step keeps."""


@pytest.mark.parametrize("itl_promise_ms", PROMISES_MS)
@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_ends_with_the_tokens_of_an_idle_engine(
    build_sim, drive, request_of, prompt_of, seed, itl_promise_ms
):
    random = Random(seed)
    requests = [
        request_of(
            prompt_of(random.randint(1, 60), random.randint(0, 3)),
            max_tokens=random.randint(1, 30),
            temperature=random.choice([0.0, 1.0]),
            seed=random.randint(0, 5),
        )
        for _ in range(60)
    ]
    expected = [drive(build_sim()).generate(request)[0] for request in requests]
    driver = drive(
        build_sim(
            num_blocks=random.randint(24, 60),
            max_num_seqs=random.randint(1, 8),
            sim_timing=SimTiming(),
            itl_promise_ms=itl_promise_ms,
        )
    )
    run_random_traffic(driver, requests, expected, random)


@pytest.mark.parametrize("itl_promise_ms", PROMISES_MS)
@pytest.mark.parametrize("seed", range(6))
def test_random_handoffs_between_two_small_nodes_leak_nothing(
    build_sim, drive, request_of, prompt_of, move_kv, seed, itl_promise_ms
):
    random = Random(seed)
    settings = {"num_blocks": 40, "sim_timing": SimTiming(), "itl_promise_ms": itl_promise_ms}
    source, target = drive(build_sim(**settings)), drive(build_sim(block_size=5, **settings))
    arriving: list[int] = []
    requests = {}
    for index in range(120):
        action = random.random()
        if action < 0.4:
            requests[index] = request_of(
                prompt_of(random.randint(1, 50), random.randint(0, 4)), max_tokens=random.randint(2, 25)
            )
            try:
                source.engine.submit_prefill(requests[index], f"k{index}")
                arriving.append(index)
            except Overloaded:
                del requests[index]
        elif action < 0.6 and arriving:
            index = arriving.pop(0)
            if source.tokens(f"k{index}"):
                ready = [item for item in source.ready if item.key == f"k{index}"]
                try:
                    move_kv(source.engine, target.engine, f"k{index}", requests[index], ready)
                    target.engine.start_decode(f"k{index}", source.tokens(f"k{index}")[0])
                except Overloaded:
                    pass
            source.engine.release(f"k{index}")
        elif action < 0.65 and requests:
            victim = random.choice(list(requests))
            source.engine.release(f"k{victim}")
            target.engine.release(f"k{victim}")
            if victim in arriving:
                arriving.remove(victim)
        source.step()
        target.step()
    for index in arriving:
        source.engine.release(f"k{index}")
    source.run()
    target.run()
    assert not source.failures
    assert not target.failures
    assert source.engine.load().num_held_blocks == target.engine.load().num_held_blocks == 0


def test_latest_arrival_is_interrupted_first(build_sim, drive, request_of, prompt_of):
    driver = drive(build_sim(num_blocks=16))
    for index in range(3):
        driver.engine.submit(request_of(prompt_of(12, index), max_tokens=40), f"k{index}")
    while driver.engine.load().num_preemptions == 0:
        driver.step()
    first, latest = len(driver.tokens("k0")), len(driver.tokens("k2"))
    for _ in range(3):
        driver.step()
    assert len(driver.tokens("k2")) == latest, "k2 waits"
    assert len(driver.tokens("k0")) == first + 3


def test_prefill_only_sequences_are_never_interrupted(build_sim, drive, request_of, prompt_of):
    driver = drive(build_sim(num_blocks=16))
    driver.engine.submit(request_of(prompt_of(12, 1), max_tokens=40), "decode")
    driver.step()
    driver.engine.submit_prefill(request_of(prompt_of(40)), "prefill")
    for _ in range(30):
        if driver.engine.has_work():
            driver.step()
    assert len(driver.tokens("prefill")) == 1
    assert driver.engine.load().num_preemptions == 1
    driver.engine.release("prefill")
    driver.run()
    assert len(driver.tokens("decode")) == 40


def test_one_decode_step_serves_all_running_sequences(build_sim, drive, request_of, prompt_of):
    driver = drive(build_sim())
    for index in range(8):
        driver.engine.submit(request_of(prompt_of(4, index), max_tokens=9), f"k{index}")
    driver.step()
    assert len(driver.step()) == 8
