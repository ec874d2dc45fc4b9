"""A prefill step queued behind another one: same tokens, same KV, told of at its turn, nothing leaked."""

from __future__ import annotations

from random import Random

import pytest

from kvrelay.core.errors import Overloaded
from kvrelay.engine.interface import StartedPrefill
from kvrelay.engine.sim.timing import SimTiming
from tests.engine.instant_transfer import InstantTransfer
from tests.engine.random_traffic import run_random_traffic

BUDGET = 32
"""Tokens of a step, as `SMALL` has it."""


def steps_until_idle(engine):
    steps = []
    while engine.has_work():
        steps.append(engine.step())
        engine.check()
    return steps


def test_the_next_prompt_is_launched_before_the_token_of_the_one_before_is_read(
    build_sim, build_ahead, drive, request_of, prompt_of
):
    requests = {key: request_of(prompt_of(BUDGET, variant)) for variant, key in enumerate("abc")}
    alone = {key: drive(build_sim()).generate(request)[0][0] for key, request in requests.items()}
    engine = build_ahead()
    transfer, driver = InstantTransfer(engine), drive(engine)
    engine.set_kv_ready_listener(transfer)
    for key, request in requests.items():
        engine.submit_prefill(request, key)
    driver.run()
    assert engine._executor.log == [
        ("launch", ("a",)),
        ("launch", ("b",)),
        ("read", ("a",)),
        ("launch", ("c",)),
        ("read", ("b",)),
        ("read", ("c",)),
    ]
    for key, request in requests.items():
        assert driver.tokens(key) == [alone[key]]
        transfer.check(key, request)


def test_the_next_chunk_is_launched_before_the_one_before_is_computed(
    build_ahead, drive, request_of, prompt_of
):
    engine = build_ahead()
    transfer, driver = InstantTransfer(engine), drive(engine)
    engine.set_kv_ready_listener(transfer)
    request = request_of(prompt_of(3 * BUDGET + 5))
    engine.submit_prefill(request, "a")
    driver.run()
    assert [what for what, _ in engine._executor.log] == [
        *("launch", "launch", "read", "launch", "read", "launch", "read", "read")
    ]
    assert len(driver.tokens("a")) == 1
    transfer.check("a", request)


def test_each_prefill_starts_when_the_one_before_it_is_over(build_ahead, request_of, prompt_of):
    engine = build_ahead()
    engine.submit(request_of(prompt_of(9), max_tokens=1), "before")
    steps_until_idle(engine)
    engine.submit_prefill(request_of(prompt_of(BUDGET, 1)), "a")
    engine.submit_prefill(request_of([*prompt_of(9)[:8], *prompt_of(BUDGET, 2)[8:]]), "b")
    first, second = steps_until_idle(engine)
    assert engine._executor.log[-3:] == [("launch", ("b",)), ("read", ("a",)), ("read", ("b",))]
    assert first.started == (StartedPrefill("a", 0),)
    assert second.started == (StartedPrefill("b", 8),)
    assert [[item.key for item in step.outputs] for step in (first, second)] == [["a"], ["b"]]


def test_a_cached_prefix_is_announced_at_its_sequences_turn(build_ahead, request_of, prompt_of):
    engine = build_ahead()
    engine.submit(request_of(prompt_of(9), max_tokens=1), "before")
    steps_until_idle(engine)
    transfer = InstantTransfer(engine)
    request = request_of([*prompt_of(9)[:8], *prompt_of(BUDGET, 2)[8:]])
    engine.submit_prefill(request_of(prompt_of(BUDGET, 1)), "a")
    engine.submit_prefill(request, "b")
    engine.step()
    assert "b" not in transfer.ready
    engine.step()
    assert transfer.ready["b"][0][0].tokens == range(8)
    transfer.check("b", request)


def test_who_waits_for_its_turn_counts_as_waiting(build_ahead, request_of, prompt_of):
    engine = build_ahead()
    engine._executor.num_parts = 3
    for key in "abc":
        engine.submit_prefill(request_of(prompt_of(BUDGET, ord(key))), key)
    engine.step()
    load = engine.load()
    assert engine._executor.log == [("launch", ("a",)), ("launch", ("b",))]
    assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (1, 2, 2 * BUDGET)


def test_what_queued_steps_use_is_freed_when_each_is_over(build_ahead, request_of, prompt_of):
    engine = build_ahead()
    engine._executor.num_parts = 2
    engine.submit_prefill(request_of(prompt_of(BUDGET, 1)), "a")
    engine.submit_prefill(request_of(prompt_of(20, 2)), "b")
    engine.step()
    engine.release("a")
    engine.release("b")
    engine.check()
    assert engine.load().num_held_blocks == 8 + 5
    assert engine.step().outputs == ()
    assert engine.load().num_held_blocks == 5, "a's step is over, b's is not"
    assert [step.outputs for step in steps_until_idle(engine)] == [(), ()]
    assert engine.load().num_held_blocks == 0


def test_nothing_is_announced_of_a_sequence_that_was_released(build_ahead, request_of, prompt_of):
    engine = build_ahead()
    engine._executor.num_parts = 2
    transfer = InstantTransfer(engine)
    engine.submit_prefill(request_of(prompt_of(BUDGET, 1)), "a")
    engine.submit_prefill(request_of(prompt_of(BUDGET, 2)), "b")
    engine.step()
    engine.release("b")
    assert [item.started for item in steps_until_idle(engine)] == [(), (), ()]
    assert list(transfer.ready) == ["a"]


def test_what_arrives_while_a_step_is_computed_is_launched_behind_it(build_ahead, request_of, prompt_of):
    engine = build_ahead()
    engine._executor.num_parts = 3
    engine.submit_prefill(request_of(prompt_of(BUDGET, 1)), "a")
    assert engine.step().is_partial
    engine.submit_prefill(request_of(prompt_of(BUDGET, 2)), "b")
    assert engine.step().is_partial
    assert engine._executor.log == [("launch", ("a",)), ("launch", ("b",))]
    whole = engine.step()
    assert not whole.is_partial
    assert ([item.key for item in whole.outputs], whole.num_prefill_tokens) == (["a"], BUDGET)


def test_a_prompt_waits_for_the_prefix_that_is_being_computed(
    build_sim, build_ahead, drive, request_of, prompt_of
):
    prefix = prompt_of(24, 1)
    requests = [request_of([*prefix, *prompt_of(8, variant)]) for variant in (2, 3)]
    cached = []
    for build in (build_sim, build_ahead):
        engine = build()
        for key, request in zip("ab", requests, strict=True):
            engine.submit_prefill(request, key)
        cached.append([started for step in steps_until_idle(engine) for started in step.started])
    assert cached[0] == cached[1] == [StartedPrefill("a", 0), StartedPrefill("b", 24)]
    assert engine._executor.num_prefills_ahead == 0


def test_a_prompt_whose_prefix_is_cached_already_waits_for_nothing(build_ahead, request_of, prompt_of):
    engine = build_ahead()
    prefix = prompt_of(24, 1)
    engine.submit(request_of([*prefix, 5], max_tokens=1), "before")
    steps_until_idle(engine)
    for variant, key in enumerate("ab"):
        engine.submit_prefill(request_of([*prefix, *prompt_of(BUDGET, 2 + variant)]), key)
    started = [item for step in steps_until_idle(engine) for item in step.started]
    assert started == [StartedPrefill("a", 24), StartedPrefill("b", 24)]
    assert engine._executor.num_prefills_ahead == 1


def test_what_cant_be_launched_is_computed_behind_and_told_once(build_ahead, request_of, prompt_of):
    engine = build_ahead()
    transfer = InstantTransfer(engine)
    requests = [request_of(prompt_of(BUDGET, 1)), request_of(prompt_of(BUDGET, 2), num_logprobs=1)]
    for key, request in zip("ab", requests, strict=True):
        engine.submit_prefill(request, key)
    steps = steps_until_idle(engine)
    assert engine._executor.log == [("launch", ("a",)), ("read", ("a",))]
    assert [started.key for step in steps for started in step.started] == ["a", "b"]
    assert [item.key for step in steps for item in step.outputs] == ["a", "b"]
    for key, request in zip("ab", requests, strict=True):
        transfer.check(key, request)


def test_nothing_is_launched_ahead_where_that_is_turned_off(build_ahead, request_of, prompt_of):
    engine = build_ahead()
    engine.runs_ahead = False
    for key in "ab":
        engine.submit_prefill(request_of(prompt_of(BUDGET, ord(key))), key)
    steps_until_idle(engine)
    assert [what for what, _ in engine._executor.log] == ["launch", "read", "launch", "read"]


def test_nothing_is_launched_ahead_of_a_first_decode(build_ahead, drive, request_of, prompt_of):
    driver = drive(build_ahead())
    driver.engine.submit(request_of(prompt_of(BUDGET, 1), max_tokens=9), "decodes")
    driver.engine.submit(request_of(prompt_of(BUDGET, 2), max_tokens=9), "waits")
    driver.step()
    assert driver.engine._executor.num_under_way == 0
    assert [item.key for item in driver.step()] == ["decodes"]


def test_nothing_is_launched_ahead_while_a_handoff_is_about_to_decode(build_ahead, request_of, prompt_of):
    engine = build_ahead()
    engine.reserve(request_of(prompt_of(9)), "arrives")
    engine.submit_prefill(request_of(prompt_of(2 * BUDGET, 1)), "a")
    engine.step()
    assert engine._executor.num_under_way == 0


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("seed", range(12))
def test_random_prompts_of_a_prefill_node_give_their_kv_and_leak_nothing(
    build_sim, build_ahead, drive, request_of, prompt_of, seed, num_parts
):
    random = Random(seed)
    requests = {
        f"k{index}": request_of(
            prompt_of(random.randint(1, 90), random.randint(0, 6)),
            temperature=random.choice([0.0, 1.0]),
            seed=random.randint(0, 5),
            num_logprobs=random.choice([None, None, None, None, 0]),
        )
        for index in range(80)
    }
    alone = {key: drive(build_sim()).generate(request)[0][0] for key, request in requests.items()}
    engine = build_ahead(num_blocks=random.randint(40, 90), host_kv_bytes=random.choice([0, 256 * 30]))
    engine._executor.num_parts = num_parts
    transfer, driver = InstantTransfer(engine), drive(engine)
    engine.set_kv_ready_listener(transfer)
    waiting, held, cancelled = list(requests), [], set()
    while waiting or engine.has_work() or held:
        while waiting and random.random() < 0.6:
            try:
                engine.submit_prefill(requests[waiting[0]], waiting[0])
            except Overloaded:
                break
            waiting.pop(0)
        held += [item.key for item in driver.step() if item.key not in cancelled]
        while held and random.random() < 0.5:
            engine.release(held.pop(random.randrange(len(held))))
        if random.random() < 0.05:
            key = random.choice([key for key in requests if key not in waiting] or list(requests))
            if key not in waiting and not driver.tokens(key):
                cancelled.add(key)
                engine.release(key)
        engine.check()
    for key, request in requests.items():
        if key in cancelled:
            assert driver.tokens(key) == []
            continue
        assert driver.tokens(key) == [alone[key]]
        transfer.check(key, request)
    assert not driver.failures
    assert engine.load().num_held_blocks == 0
    assert engine._executor.num_prefills_ahead > 3


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_of_one_engine_in_parts_gives_the_tokens_of_one_that_waits(
    build_sim, build_ahead, drive, request_of, prompt_of, seed
):
    random = Random(seed)
    requests = [
        request_of(
            prompt_of(random.randint(1, 120), random.randint(0, 3)), max_tokens=random.choice([1, 1, 12])
        )
        for _ in range(60)
    ]
    expected = [drive(build_sim()).generate(request)[0] for request in requests]
    engine = build_ahead(
        num_blocks=random.randint(40, 90), max_num_seqs=random.randint(1, 8), sim_timing=SimTiming()
    )
    engine._executor.num_parts = random.randint(1, 3)
    run_random_traffic(drive(engine), requests, expected, random)
    assert engine._executor.num_prefills_ahead > 3
