"""A prefix goes from one engine's cache into another's, and counts there as if it had been computed."""

from __future__ import annotations

import pytest

from kvrelay.core.errors import DuplicateRequest, Overloaded
from kvrelay.core.request import Prefix


def assert_nothing_held(engine):
    engine.check()
    assert engine.load().num_held_blocks == 0


def pull(source, target, prefix, key="pull"):
    """Take `prefix` from `source`'s cache into `target`'s; returns how many tokens `source` had, and how many
    `target` has now."""
    pinned, reserved = source.pin_prefix(prefix, key), target.reserve_prefix(prefix, key)
    source.check()
    target.check()
    num_tokens = pinned.num_cached_tokens
    tokens = range(reserved.num_cached_tokens, num_tokens)
    if tokens:
        layers = range(source.kv.layout.num_layers)
        staging = source.kv.allocate_staging(source.kv.layout.token_bytes * len(tokens))
        source.kv.gather(pinned.block_table, layers, tokens, staging, 0).wait()
        target.kv.scatter(reserved.block_table, layers, tokens, staging, 0).wait()
    source.release(key)
    return num_tokens, target.keep_prefix(key, max(num_tokens, reserved.num_cached_tokens))


@pytest.fixture
def request_40(request_of, prompt_of):
    return request_of(prompt_of(40))


@pytest.mark.parametrize("block_size", [4, 6, 8])
def test_a_pulled_prefix_is_a_cache_hit_and_the_answer_is_the_computed_one(
    build_engine, drive, request_40, block_size
):
    source = drive(build_engine())
    [computed] = source.generate(request_40)
    target = drive(build_engine(block_size=block_size))
    num_sent, num_kept = pull(source.engine, target.engine, Prefix(request_40.token_ids))
    assert num_sent == 40
    assert num_kept == 40 // block_size * block_size
    assert_nothing_held(source.engine)
    assert_nothing_held(target.engine)
    assert target.generate(request_40) == [computed]
    load = target.engine.load()
    assert load.prefix_hit_tokens == (39 // block_size) * block_size
    assert_nothing_held(target.engine)


def test_generated_tokens_go_back_to_whoever_computes_the_next_turn(
    build_engine, drive, request_of, prompt_of
):
    first = drive(build_engine())
    [answer] = first.generate(request_of(prompt_of(9), max_tokens=12))
    turn = request_of([*prompt_of(9), *answer, 7, 8, 9])
    [computed] = drive(build_engine()).generate(turn)
    target = drive(build_engine())
    num_sent, _ = pull(first.engine, target.engine, Prefix(turn.token_ids))
    assert num_sent == 20  # of 21, the last of which no step has computed
    assert target.generate(turn) == [computed]
    assert target.engine.load().prefix_hit_tokens == 20


def test_only_what_is_missing_is_received(build_engine, drive, request_of, prompt_of):
    request = request_of(prompt_of(40))
    source, target = drive(build_engine()), drive(build_engine())
    [computed] = source.generate(request)
    target.generate(request_of(prompt_of(40)[:17]))
    reserved = target.engine.reserve_prefix(Prefix(request.token_ids), "pull")
    assert reserved.num_cached_tokens == 16
    target.engine.release("pull")
    assert pull(source.engine, target.engine, Prefix(request.token_ids)) == (40, 40)
    assert target.generate(request) == [computed]


def test_a_prefix_of_another_salt_is_not_found(build_engine, drive, request_of, prompt_of):
    driver = drive(build_engine())
    driver.generate(request_of(prompt_of(20), salt=b"mine"))
    pinned = driver.engine.pin_prefix(Prefix(tuple(prompt_of(20)), b"yours"), "a")
    assert (pinned.num_cached_tokens, pinned.block_table) == (0, ())
    assert driver.engine.pin_prefix(Prefix(tuple(prompt_of(20)), b"mine"), "b").num_cached_tokens == 20
    driver.engine.release("a")
    driver.engine.release("b")
    assert_nothing_held(driver.engine)


def test_what_is_pinned_is_not_evicted(build_engine, drive, request_of, prompt_of):
    driver = drive(build_engine(num_blocks=16))
    driver.generate(request_of(prompt_of(20)))
    prefix = Prefix(tuple(prompt_of(20)))
    pinned = driver.engine.pin_prefix(prefix, "pin")
    for variant in range(1, 4):
        driver.generate(request_of(prompt_of(30, variant)))
    again = driver.engine.pin_prefix(prefix, "again")
    assert again.block_table == pinned.block_table
    driver.engine.release("pin")
    driver.engine.release("again")
    assert_nothing_held(driver.engine)


def test_a_prefix_that_does_not_fit_is_refused_and_nothing_is_held(
    build_engine, drive, request_of, prompt_of
):
    engine = build_engine(num_blocks=8)
    with pytest.raises(Overloaded):
        engine.reserve_prefix(Prefix(tuple(prompt_of(33))), "a")
    assert_nothing_held(engine)
    engine.reserve_prefix(Prefix(tuple(prompt_of(32))), "a")
    with pytest.raises(Overloaded):
        engine.reserve_prefix(Prefix((1,)), "b")
    engine.release("a")
    assert_nothing_held(engine)
    assert engine.load().num_cached_blocks == 0, "what has not arrived is not found"


def test_a_key_holds_one_prefix(build_engine, prompt_of):
    engine = build_engine()
    prefix = Prefix(tuple(prompt_of(8)))
    engine.reserve_prefix(prefix, "a")
    for enter in (engine.reserve_prefix, engine.pin_prefix):
        with pytest.raises(DuplicateRequest):
            enter(prefix, "a")
    engine.release("a")
    assert engine.keep_prefix("a", 8) == 0
    assert_nothing_held(engine)


def test_what_has_arrived_in_part_is_kept_in_part(build_engine, drive, request_of, prompt_of):
    request = request_of(prompt_of(40))
    source, target = drive(build_engine()), drive(build_engine())
    source.generate(request_of(prompt_of(22), max_tokens=1))
    [computed] = drive(build_engine()).generate(request)
    assert pull(source.engine, target.engine, Prefix(request.token_ids)) == (20, 20)
    assert target.generate(request) == [computed]
    assert target.engine.load().prefix_hit_tokens == 20


def test_an_evicted_prefix_is_sent_from_the_host_tier(build_engine, drive, request_of, prompt_of):
    engine = build_engine(num_blocks=16)
    block_bytes = engine.kv.layout.token_bytes * 4
    source = drive(build_engine(num_blocks=16, host_kv_bytes=64 * block_bytes))
    request = request_of(prompt_of(40))
    [computed] = source.generate(request)
    source.generate(request_of(prompt_of(50, 1)))
    target = drive(build_engine())
    assert pull(source.engine, target.engine, Prefix(request.token_ids)) == (40, 40)
    assert target.generate(request) == [computed]
    assert_nothing_held(source.engine)


def test_as_much_is_pinned_as_there_is_room_to_restore(build_engine, drive, request_of, prompt_of):
    block_bytes = build_engine().kv.layout.token_bytes * 4
    driver = drive(build_engine(num_blocks=16, host_kv_bytes=64 * block_bytes))
    driver.generate(request_of(prompt_of(40)))
    driver.generate(request_of(prompt_of(50, 1)))
    driver.engine.reserve_prefix(Prefix(tuple(prompt_of(40, 2))), "in the way")
    pinned = driver.engine.pin_prefix(Prefix(tuple(prompt_of(40))), "pin")
    assert pinned.num_cached_tokens == 6 * 4
    driver.engine.check()
    driver.engine.release("pin")
    driver.engine.release("in the way")
    assert_nothing_held(driver.engine)


def test_kv_that_is_seen_to_be_wrong_is_not_kept(build_sim, drive, request_of, prompt_of):
    engine = build_sim()
    engine.reserve_prefix(Prefix(tuple(prompt_of(20))), "pull")
    assert engine.keep_prefix("pull", 20) == 0
    assert_nothing_held(engine)
    assert engine.load().num_cached_blocks == 0


def test_a_decode_that_grows_beside_a_pin_still_ends(build_engine, drive, request_of, prompt_of):
    driver = drive(build_engine(num_blocks=16))
    driver.generate(request_of(prompt_of(28), max_tokens=1))
    driver.engine.pin_prefix(Prefix(tuple(prompt_of(28))), "pin")
    tokens = driver.generate(*(request_of(prompt_of(6, variant), max_tokens=12) for variant in (1, 2)))
    assert [len(answer) for answer in tokens] == [12, 12]
    driver.engine.release("pin")
    assert_nothing_held(driver.engine)
