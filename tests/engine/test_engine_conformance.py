"""What every engine does, whatever computes inside it."""

from __future__ import annotations

import pytest

from kvrelay.core.errors import ContextLengthExceeded, DuplicateRequest, InvalidRequest, Overloaded
from kvrelay.core.request import FinishReason
from kvrelay.core.sampling import Grammar, GrammarKind


def assert_idle(engine):
    """Nothing is held: every block is empty or in the prefix cache."""
    load = engine.load()
    assert (load.num_running, load.num_waiting, load.num_reserved, load.num_held_blocks) == (0, 0, 0, 0)
    assert load.num_cached_blocks + load.num_empty_blocks == engine.info.num_blocks


def test_generates_max_tokens_with_consecutive_indices_and_frees_all(
    build_engine, drive, request_of, prompt_of
):
    driver = drive(build_engine())
    driver.engine.submit(request_of(prompt_of(10), max_tokens=6), "a")
    driver.run()
    outputs = driver.outputs["a"]
    assert [output.index for output in outputs] == list(range(6))
    assert [output.finish_reason for output in outputs] == [None] * 5 + [FinishReason.LENGTH]
    assert_idle(driver.engine)


def test_same_prompt_gives_same_tokens_alone_and_in_a_batch(build_engine, drive, request_of, prompt_of):
    requests = [request_of(prompt_of(length, length)) for length in (1, 2, 3, 4, 5, 8, 17, 40)]
    alone = [drive(build_engine()).generate(request)[0] for request in requests]
    assert drive(build_engine()).generate(*requests) == alone


def test_sampled_tokens_are_the_same_alone_and_in_a_batch(build_engine, drive, request_of, prompt_of):
    requests = [
        request_of(prompt_of(9, seed), temperature=1.3, seed=seed, top_p=0.9, top_k=50, max_tokens=12)
        for seed in range(8)
    ]
    alone = [drive(build_engine()).generate(request)[0] for request in requests]
    assert drive(build_engine()).generate(*requests) == alone
    assert len({tuple(tokens) for tokens in alone}) == len(alone)


def test_different_seeds_draw_different_tokens(build_engine, drive, request_of, prompt_of):
    first, second = drive(build_engine()).generate(
        *(request_of(prompt_of(9), temperature=2.0, seed=seed, max_tokens=16) for seed in (1, 2))
    )
    assert first != second


@pytest.mark.parametrize("budget", [8, 9, 33, 512])
def test_chunk_size_does_not_change_the_output(build_engine, drive, request_of, prompt_of, budget):
    requests = [request_of(prompt_of(length, length)) for length in (70, 31, 5)]
    expected = [drive(build_engine(max_num_batched_tokens=512)).generate(item)[0] for item in requests]
    assert drive(build_engine(max_num_batched_tokens=budget)).generate(*requests) == expected


def test_continuation_goes_on_as_the_unbroken_stream(build_engine, drive, request_of, prompt_of):
    sampling = {"temperature": 1.0, "seed": 11, "max_tokens": 12}
    [whole] = drive(build_engine()).generate(request_of(prompt_of(13), **sampling))
    driver = drive(build_engine())
    driver.engine.submit(request_of(prompt_of(13), outputs=whole[:5], **sampling), "rest")
    driver.run()
    assert driver.tokens("rest") == whole[5:]
    assert [output.index for output in driver.outputs["rest"]] == list(range(5, 12))


def test_stop_token_ends_the_sequence_and_is_delivered(build_engine, drive, request_of, prompt_of):
    [tokens] = drive(build_engine()).generate(
        request_of(prompt_of(6), temperature=2.0, seed=3, max_tokens=10)
    )
    stop = tokens[4]
    driver = drive(build_engine())
    driver.engine.submit(
        request_of(prompt_of(6), temperature=2.0, seed=3, max_tokens=10, stop_token_ids=(stop,)), "a"
    )
    driver.run()
    assert driver.tokens("a") == tokens[: tokens.index(stop) + 1]
    assert driver.outputs["a"][-1].finish_reason is FinishReason.STOP


def test_no_stop_token_is_drawn_before_min_tokens(build_engine, drive, request_of, prompt_of):
    sampling = {"temperature": 2.0, "seed": 3, "max_tokens": 12}
    [free] = drive(build_engine()).generate(request_of(prompt_of(6), **sampling))
    stops = tuple(set(free))
    for min_tokens in (0, 1, 5, 12):
        driver = drive(build_engine())
        request = request_of(prompt_of(6), **sampling, stop_token_ids=stops, min_tokens=min_tokens)
        driver.engine.submit(request, "a")
        driver.run()
        tokens = driver.tokens("a")
        assert not set(tokens[:min_tokens]) & set(stops)
        assert len(tokens) > min_tokens or min_tokens == 12
        assert driver.outputs["a"][-1].finish_reason is not None


def test_min_tokens_hold_across_a_continuation(build_engine, drive, request_of, prompt_of):
    sampling = {"temperature": 1.0, "seed": 11, "max_tokens": 12}
    [free] = drive(build_engine()).generate(request_of(prompt_of(13), **sampling))
    sampling |= {"stop_token_ids": tuple(set(free)), "min_tokens": 9}
    [whole] = drive(build_engine()).generate(request_of(prompt_of(13), **sampling))
    assert len(whole) >= 9
    for split in range(1, len(whole)):
        rest = request_of(prompt_of(13), outputs=whole[:split], **sampling)
        assert drive(build_engine()).generate(rest) == [whole[split:]]


def test_min_tokens_that_nothing_can_reach_fail_that_sequence_alone(request_of, prompt_of, build_sim, drive):
    driver = drive(build_sim(sim_vocab_size=4))
    driver.engine.submit(request_of([1, 2], stop_token_ids=(1, 2, 3), min_tokens=2), "stuck")
    driver.engine.submit(request_of([1, 2], stop_token_ids=(1, 2), min_tokens=2), "goes")
    driver.run()
    assert [(item.key, item.field) for item in driver.failures] == [("stuck", "sampling.min_tokens")]
    assert driver.tokens("goes")[:2] == [3, 3]
    assert_idle(driver.engine)


def test_a_grammar_that_the_engine_can_not_follow_is_refused_by_name(build_engine, request_of, prompt_of):
    """The simulated engine has no logits, the tiny model no tokenizer."""
    engine = build_engine()
    request = request_of(prompt_of(20), grammar=Grammar(GrammarKind.JSON_OBJECT))
    for enter in (engine.submit, engine.submit_prefill, engine.reserve):
        with pytest.raises(InvalidRequest) as refusal:
            enter(request, "a")
        assert refusal.value.field == "sampling.grammar"
        assert_idle(engine)
        assert not engine.has_work()
    engine.submit(request_of(prompt_of(20)), "a")
    engine.check()


def test_full_context_ends_with_length(build_engine, drive, request_of, prompt_of):
    driver = drive(build_engine(max_model_len=20))
    driver.engine.submit(request_of(prompt_of(15), max_tokens=100), "a")
    driver.run()
    assert len(driver.tokens("a")) == 5
    assert driver.outputs["a"][-1].finish_reason is FinishReason.LENGTH


def test_prefix_cache_is_hit_and_changes_nothing(build_engine, drive, request_of, prompt_of):
    driver = drive(build_engine())
    prompt = prompt_of(41)
    [first] = driver.generate(request_of(prompt))
    before = driver.engine.load().prefix_hit_tokens
    [second] = driver.generate(request_of(prompt))
    assert second == first
    assert driver.engine.load().prefix_hit_tokens - before == 40


def test_prefix_hit_never_covers_the_last_token(build_engine, drive, request_of, prompt_of):
    driver = drive(build_engine())
    driver.generate(request_of(prompt_of(40)))
    before = driver.engine.load().prefix_hit_tokens
    driver.generate(request_of(prompt_of(40)))
    assert driver.engine.load().prefix_hit_tokens - before == 36


def test_other_salt_shares_no_blocks(build_engine, drive, request_of, prompt_of):
    driver = drive(build_engine())
    [first] = driver.generate(request_of(prompt_of(40)))
    [second] = driver.generate(request_of(prompt_of(40), salt=b"tenant"))
    assert second == first
    assert driver.engine.load().prefix_hit_tokens == 0


def test_preempted_sequences_end_as_if_never_interrupted(build_engine, drive, request_of, prompt_of):
    requests = [
        request_of(prompt_of(10, variant), max_tokens=50, temperature=0.8, seed=variant)
        for variant in range(6)
    ]
    expected = [drive(build_engine()).generate(item)[0] for item in requests]
    driver = drive(build_engine(num_blocks=30))
    assert driver.generate(*requests) == expected
    assert driver.engine.load().num_preemptions > 0
    assert_idle(driver.engine)


def test_waiting_queue_is_bounded(build_engine, drive, request_of, prompt_of):
    engine = build_engine(max_waiting=2)
    for index in range(2):
        engine.submit(request_of(prompt_of(4)), f"k{index}")
    with pytest.raises(Overloaded):
        engine.submit(request_of(prompt_of(4)), "k2")
    assert engine.load().num_waiting == 2
    drive(engine).run()
    assert_idle(engine)


def test_refuses_what_it_can_never_serve(build_engine, request_of, prompt_of):
    engine = build_engine(num_blocks=8)  # 32 tokens
    for enter in (engine.submit, engine.submit_prefill, engine.reserve):
        with pytest.raises(ContextLengthExceeded):
            enter(request_of(prompt_of(32)), "long")
        with pytest.raises(InvalidRequest, match="vocabulary"):
            enter(request_of([5, 211]), "alien")
        with pytest.raises(InvalidRequest, match="max_tokens"):
            enter(request_of([5], outputs=[6, 7], max_tokens=2), "spent")
        with pytest.raises(InvalidRequest, match=r"sampling\.logit_bias"):
            enter(request_of([5], logit_bias=((211, 1.0),)), "bias")
    assert_idle(engine)


def test_key_in_use_is_refused(build_engine, request_of, prompt_of):
    engine = build_engine()
    engine.submit(request_of(prompt_of(4)), "a")
    with pytest.raises(DuplicateRequest):
        engine.reserve(request_of(prompt_of(4)), "a")


def test_prefill_draws_one_token_and_holds_its_kv_until_released(build_engine, drive, request_of, prompt_of):
    driver = drive(build_engine())
    [expected] = drive(build_engine()).generate(request_of(prompt_of(21)))
    driver.engine.submit_prefill(request_of(prompt_of(21)), "p")
    driver.run()
    [output] = driver.outputs["p"]
    assert (output.index, output.token_id, output.finish_reason) == (0, expected[0], None)
    assert driver.engine.load().num_held_blocks == 6
    driver.engine.release("p")
    driver.engine.release("p")
    assert_idle(driver.engine)


def test_prefill_reports_a_finishing_first_token(build_engine, drive, request_of, prompt_of):
    driver = drive(build_engine())
    driver.engine.submit_prefill(request_of(prompt_of(5), max_tokens=1), "p")
    driver.run()
    assert driver.outputs["p"][0].finish_reason is FinishReason.LENGTH
    driver.engine.release("p")
    assert_idle(driver.engine)


@pytest.mark.parametrize("layers_per_group", [1, 2, None])
def test_kv_ready_covers_every_layer_of_every_token_once_and_in_order(
    build_engine, drive, request_of, prompt_of, layers_per_group
):
    driver = drive(build_engine(layers_per_group=layers_per_group))
    driver.generate(request_of(prompt_of(30)))
    assert driver.ready == [], "only prefill-only sequences are reported"
    driver.engine.submit_prefill(request_of(prompt_of(90)), "p")
    driver.run()
    num_layers = driver.engine.kv.layout.num_layers
    hit = driver.ready[0]
    assert (hit.layers, hit.tokens) == (range(num_layers), range(28)), "the cached prefix comes first"
    covered = set()
    for item in driver.ready:
        assert item.key == "p"
        cells = {(layer, token) for layer in item.layers for token in item.tokens}
        assert not cells & covered
        covered |= cells
    assert covered == {(layer, token) for layer in range(num_layers) for token in range(90)}
    order = [(item.tokens.start, item.layers.start) for item in driver.ready]
    assert order == sorted(order)
    assert len({tuple(item.block_table) for item in driver.ready}) == 1


@pytest.mark.parametrize("target_block_size", [4, 3])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.1, "seed": 5, "repetition_penalty": 1.2}])
def test_handed_off_sequence_goes_on_as_if_never_moved(
    build_engine, drive, request_of, prompt_of, move_kv, sampling, target_block_size
):
    request = request_of(prompt_of(37), max_tokens=15, **sampling)
    [expected] = drive(build_engine()).generate(request)
    source = drive(build_engine())
    target = drive(build_engine(block_size=target_block_size))
    source.engine.submit_prefill(request, "s")
    source.run()
    move_kv(source.engine, target.engine, "s", request, source.ready)
    assert not target.engine.has_work(), "a reservation is not work"
    target.engine.start_decode("s", source.tokens("s")[0])
    source.engine.release("s")
    target.run()
    assert source.tokens("s") + target.tokens("s") == expected
    assert target.outputs["s"][0].index == 1
    assert_idle(source.engine)
    assert_idle(target.engine)


def test_second_turn_needs_only_the_missing_suffix(build_engine, drive, request_of, prompt_of, move_kv):
    source, target = drive(build_engine()), drive(build_engine())
    target.generate(request_of(prompt_of(33)))
    request = request_of(prompt_of(50), max_tokens=10)
    [expected] = drive(build_engine()).generate(request)
    source.engine.submit_prefill(request, "s")
    source.run()
    move_kv(source.engine, target.engine, "s", request, source.ready)
    assert target.engine.load().prefix_hit_tokens == 32
    target.engine.start_decode("s", source.tokens("s")[0])
    target.run()
    assert target.tokens("s") == expected[1:]


def test_received_blocks_join_the_prefix_cache(build_engine, drive, request_of, prompt_of, move_kv):
    request = request_of(prompt_of(24), max_tokens=4)
    source, target = drive(build_engine()), drive(build_engine())
    source.engine.submit_prefill(request, "s")
    source.run()
    move_kv(source.engine, target.engine, "s", request, source.ready)
    target.engine.start_decode("s", source.tokens("s")[0])
    target.run()
    [again] = target.generate(request)
    assert again == source.tokens("s") + target.tokens("s")
    assert target.engine.load().prefix_hit_tokens == 20


def test_preempted_handoff_is_recomputed_and_ends_alike(build_engine, drive, request_of, prompt_of, move_kv):
    requests = [request_of(prompt_of(12, variant), max_tokens=40) for variant in range(4)]
    expected = [drive(build_engine()).generate(item)[0] for item in requests]
    source, target = drive(build_engine()), drive(build_engine(num_blocks=20))
    for index, request in enumerate(requests):
        source.ready.clear()
        source.engine.submit_prefill(request, f"s{index}")
        source.run()
        move_kv(source.engine, target.engine, f"s{index}", request, source.ready)
    for index in range(4):
        target.engine.start_decode(f"s{index}", source.tokens(f"s{index}")[0])
    target.run()
    assert target.engine.load().num_preemptions > 0
    assert [source.tokens(f"s{i}") + target.tokens(f"s{i}") for i in range(4)] == expected


def test_reservation_is_refused_when_there_is_no_room(build_engine, request_of, prompt_of):
    engine = build_engine(num_blocks=10)
    engine.reserve(request_of(prompt_of(30)), "a")
    with pytest.raises(Overloaded):
        engine.reserve(request_of(prompt_of(12, 1)), "b")
    engine.release("a")
    engine.reserve(request_of(prompt_of(12, 1)), "b")
    engine.check()


def test_reservations_count_against_the_sequence_limit(build_engine, drive, request_of, prompt_of):
    engine = build_engine(max_num_seqs=2)
    engine.reserve(request_of(prompt_of(4)), "a")
    engine.reserve(request_of(prompt_of(4)), "b")
    with pytest.raises(Overloaded):
        engine.reserve(request_of(prompt_of(4)), "c")
    engine.submit(request_of(prompt_of(4)), "d")
    assert not engine.has_work()
    engine.release("a")
    drive(engine).run()
    engine.release("b")
    assert_idle(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
@pytest.mark.parametrize("enter", ["submit", "submit_prefill"])
def test_release_at_any_time_frees_everything_or_leaves_it_to_the_step_under_way(
    build_engine, drive, request_of, prompt_of, num_steps, enter
):
    driver = drive(build_engine())
    getattr(driver.engine, enter)(request_of(prompt_of(70)), "a")
    driver.engine.submit(request_of(prompt_of(20, 1)), "b")
    for _ in range(num_steps):
        driver.step()
    driver.engine.release("a")
    driver.engine.check()
    driver.engine.release("b")
    if not driver.engine.has_work():
        assert_idle(driver.engine)
    num_outputs = sum(map(len, driver.outputs.values()))
    driver.run()
    assert_idle(driver.engine)
    assert driver.engine.step().outputs == ()
    assert sum(map(len, driver.outputs.values())) == num_outputs


def test_release_of_a_reservation_frees_it_and_later_start_is_ignored(build_engine, request_of, prompt_of):
    engine = build_engine()
    engine.reserve(request_of(prompt_of(20)), "a")
    engine.release("a")
    engine.start_decode("a", 5)
    engine.start_decode("never", 5)
    assert not engine.has_work()
    assert_idle(engine)


def test_release_while_decoding_after_a_handoff(build_engine, drive, request_of, prompt_of, move_kv):
    request = request_of(prompt_of(12), max_tokens=20)
    source, target = drive(build_engine()), drive(build_engine())
    source.engine.submit_prefill(request, "s")
    source.run()
    move_kv(source.engine, target.engine, "s", request, source.ready)
    target.engine.start_decode("s", source.tokens("s")[0])
    target.step()
    target.engine.release("s")
    target.run()  # a step may be under way
    assert not target.engine.has_work()
    assert_idle(target.engine)


def test_what_is_about_to_decode_counts_as_running(build_engine, drive, request_of, prompt_of, move_kv):
    request = request_of(prompt_of(12), max_tokens=20)
    source, target = drive(build_engine()), drive(build_engine())
    source.engine.submit_prefill(request, "s")
    source.run()
    move_kv(source.engine, target.engine, "s", request, source.ready)
    target.engine.start_decode("s", source.tokens("s")[0])
    load = target.engine.load()
    assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (1, 0, 0)


def test_start_decode_with_a_finishing_token_frees_the_sequence(
    build_engine, drive, request_of, prompt_of, move_kv
):
    request = request_of(prompt_of(12), max_tokens=1)
    source, target = drive(build_engine()), drive(build_engine())
    source.engine.submit_prefill(request, "s")
    source.run()
    move_kv(source.engine, target.engine, "s", request, source.ready)
    target.engine.start_decode("s", source.tokens("s")[0])
    assert not target.engine.has_work()
    assert_idle(target.engine)


def test_release_by_the_listener_during_a_step_is_safe(build_engine, drive, request_of, prompt_of):
    driver = drive(build_engine())
    driver.engine.set_kv_ready_listener(lambda ready: driver.engine.release(ready.key))
    driver.engine.submit_prefill(request_of(prompt_of(20)), "a")
    assert driver.step() == []
    assert_idle(driver.engine)


def test_step_counts_prefill_and_decode_tokens(build_engine, request_of, prompt_of):
    engine = build_engine()
    engine.submit(request_of(prompt_of(20), max_tokens=3), "a")
    counts = []
    while engine.has_work():
        result = engine.step()
        counts.append((result.num_prefill_tokens, result.num_decode_tokens))
    assert counts == [(20, 0), (0, 1), (0, 1)]


def test_decode_goes_on_while_a_long_prompt_is_prefilled(build_engine, drive, request_of, prompt_of):
    driver = drive(build_engine())
    driver.engine.submit(request_of(prompt_of(5), max_tokens=20), "short")
    driver.step()
    driver.engine.submit(request_of(prompt_of(120, 1)), "long")
    for _ in range(3):
        assert [output.key for output in driver.step()] == ["short"], "a chunk must not stall decode"


def test_step_without_work_does_nothing(build_engine):
    engine = build_engine()
    assert not engine.has_work()
    result = engine.step()
    assert (result.outputs, result.failures, result.num_prefill_tokens) == ((), (), 0)


def test_gather_of_any_range_inverts_scatter(build_engine, drive, request_of, prompt_of):
    source, target = build_engine(), build_engine(block_size=5)
    driver = drive(source)
    source.submit_prefill(request_of(prompt_of(50)), "p")
    driver.run()
    num_layers, token_bytes = source.kv.layout.num_layers, source.kv.layout.token_bytes_per_layer
    table = driver.ready[0].block_table
    other = target.reserve(request_of(prompt_of(50)), "r").block_table
    for layers, tokens in (
        (range(num_layers), range(50)),
        (range(1, 2), range(3, 4)),
        (range(2), range(7, 31)),
    ):
        size = len(layers) * len(tokens) * token_bytes
        first, second = source.kv.allocate_staging(size), target.kv.allocate_staging(size + 3)
        assert first.address % 4096 == 0
        assert source.kv.gather(table, layers, tokens, first, 0).wait() == size
        assert target.kv.scatter(other, layers, tokens, first, 0).wait() == size
        assert target.kv.gather(other, layers, tokens, second, 3).wait() == size
        assert bytes(second.host_view()[3 : 3 + size]) == bytes(first.host_view()[:size])
        assert any(first.host_view()[:size])


def test_a_block_is_found_only_behind_the_prefix_it_was_computed_behind(
    build_engine, drive, request_of, prompt_of
):
    driver = drive(build_engine())
    first, second = prompt_of(9, 1), prompt_of(9, 2)
    driver.generate(request_of(first), request_of(second))
    mixed = first[:4] + second[4:]
    [expected] = drive(build_engine()).generate(request_of(mixed))
    before = driver.engine.load().prefix_hit_tokens
    assert driver.generate(request_of(mixed)) == [expected]
    assert driver.engine.load().prefix_hit_tokens - before == 4


def test_received_prompt_is_cached_as_soon_as_decode_starts(
    build_engine, drive, request_of, prompt_of, move_kv
):
    request = request_of(prompt_of(24), max_tokens=4)
    source, target = drive(build_engine()), drive(build_engine())
    source.engine.submit_prefill(request, "s")
    source.run()
    move_kv(source.engine, target.engine, "s", request, source.ready)
    assert target.engine.reserve(request, "before").num_cached_tokens == 0
    target.engine.start_decode("s", source.tokens("s")[0])
    assert target.engine.reserve(request, "after").num_cached_tokens == 20


def test_a_prefill_under_way_is_never_interrupted(build_engine, drive, request_of, prompt_of):
    driver = drive(build_engine(num_blocks=16, max_num_seqs=2, max_num_batched_tokens=2))
    driver.engine.submit(request_of(prompt_of(6, 1), max_tokens=30), "decode")
    while not driver.tokens("decode"):
        driver.step()
    driver.engine.submit_prefill(request_of(prompt_of(48)), "prefill")
    while not driver.tokens("prefill"):
        driver.step()
    load = driver.engine.load()
    assert (load.num_preemptions, load.num_waiting) == (1, 1), "the decode gave way"
    cells = [(layer, token) for item in driver.ready for layer in item.layers for token in item.tokens]
    assert len(cells) == len(set(cells)) == 48 * driver.engine.kv.layout.num_layers
    driver.engine.release("prefill")
    driver.run()
    assert [driver.tokens("decode")] == drive(build_engine()).generate(
        request_of(prompt_of(6, 1), max_tokens=30)
    )
