"""The torch engine under grammars: the same output alone, batched, preempted, continued and handed off.

The model is random and tiny, but has SmolLM2's tokenizer, a padded vocabulary and two ends of sequence.
"""

from __future__ import annotations

import json
import re
import shutil

import pytest
from tokenizers import Tokenizer

from kvrelay.core.errors import InvalidRequest, Overloaded
from kvrelay.core.request import FinishReason
from kvrelay.core.sampling import Grammar, GrammarKind
from kvrelay.engine.config import EngineConfig, GrammarLimits
from kvrelay.engine.embedded_model import ensure_smollm2
from kvrelay.engine.torch_engine import TorchEngine

pytestmark = pytest.mark.model

VOCAB_SIZE, EOS_IDS = 49_152 + 64, [2, 0]
PATTERN = r"[a-z]{3,12}-\d{4}(, [a-z]{1,9}){2,4}!"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "color": {"enum": ["red", "green"]},
    },
    "required": ["name", "size", "color"],
    "additionalProperties": False,
}
GRAMMARS = {
    "object": Grammar(GrammarKind.JSON_OBJECT),
    "schema": Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)),
    "regex": Grammar(GrammarKind.REGEX, PATTERN),
    "lark": Grammar(GrammarKind.LARK, f"start: item+\nitem: /[a-z]{{1,4}}/ | %json {json.dumps(SCHEMA)}"),
}
SAMPLED = {"temperature": 1.2, "top_p": 0.95, "seed": 5}


@pytest.fixture(scope="session")
def model(tmp_path_factory, save_model):
    shape = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_attention_heads": 2, "eos_token_id": EOS_IDS}
    folder = save_model(tmp_path_factory.mktemp("grammar") / "llama", "Llama", **shape)
    shutil.copy(ensure_smollm2() / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="session")
def decode(model):
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=False)


@pytest.fixture
def build(model):
    def build_engine(**changes):
        small = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32}
        return TorchEngine(EngineConfig(model=str(model), **{**small, **changes}))

    return build_engine


def requests_of(request_of, prompt_of, **sampling):
    """One under each grammar, and one free."""
    return [
        request_of(prompt_of(9, variant), **{"max_tokens": 40, "grammar": grammar, **sampling})
        for variant, grammar in enumerate([*GRAMMARS.values(), None])
    ]


def without_end(token_ids):
    assert not set(token_ids[:-1]) & set(EOS_IDS)
    return token_ids[:-1] if token_ids[-1] in EOS_IDS else token_ids


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_complete_match_ends_the_output(build, drive, request_of, prompt_of, decode, sampling, ignore_eos):
    driver = drive(build())
    for key in ("schema", "regex"):
        request = request_of(
            prompt_of(9), grammar=GRAMMARS[key], max_tokens=200, ignore_eos=ignore_eos, **sampling
        )
        driver.engine.submit(request, key)
    driver.run()
    found = json.loads(decode(without_end(driver.tokens("schema"))))
    assert list(found) == ["name", "size", "color"]
    assert 0 <= found["size"] <= 999
    assert found["color"] in ("red", "green")
    assert re.fullmatch(PATTERN, decode(without_end(driver.tokens("regex"))))
    for outputs in driver.outputs.values():
        assert outputs[-1].token_id in EOS_IDS
        assert [output.finish_reason for output in outputs[-2:]] == [None, FinishReason.STOP]


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_output_is_the_same_alone_and_in_a_batch(build, drive, request_of, prompt_of, sampling):
    requests = requests_of(request_of, prompt_of, **sampling)
    alone = [drive(build()).generate(request)[0] for request in requests]
    assert drive(build()).generate(*requests) == alone
    assert len({tuple(tokens) for tokens in alone}) == len(requests)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_output_is_the_same_after_preemption(build, drive, request_of, prompt_of, sampling):
    requests = requests_of(request_of, prompt_of, **sampling)
    expected = drive(build()).generate(*requests)
    driver = drive(build(num_blocks=24))
    assert driver.generate(*requests) == expected
    assert driver.engine.load().num_preemptions > 0


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_output_goes_on_from_any_split(build, drive, request_of, prompt_of, sampling):
    driver = drive(build())
    for request in requests_of(request_of, prompt_of, **sampling, max_tokens=24):
        [whole] = driver.generate(request)
        splits = range(1, len(whole))
        rests = driver.generate(*(request.continued_with(tuple(whole[:split])) for split in splits))
        assert rests == [whole[split:] for split in splits]


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_output_goes_on_after_a_handoff(build, drive, request_of, prompt_of, move_kv, sampling):
    for request in requests_of(request_of, prompt_of, **sampling):
        [expected] = drive(build()).generate(request)
        source, target = drive(build()), drive(build(block_size=3))
        source.engine.submit_prefill(request, "s")
        source.run()
        move_kv(source.engine, target.engine, "s", request, source.ready)
        target.engine.start_decode("s", source.tokens("s")[0])
        target.run()
        assert source.tokens("s") + target.tokens("s") == expected


def test_a_prefill_whose_first_token_completes_the_match_says_so(build, drive, request_of, prompt_of):
    driver = drive(build())
    digit = Grammar(GrammarKind.REGEX, "[0-9]")
    [tokens] = driver.generate(request_of(prompt_of(5), grammar=digit))
    driver.engine.submit_prefill(request_of(prompt_of(5), grammar=digit, outputs=tokens[:1]), "p")
    driver.run()
    [output] = driver.outputs["p"]
    assert (output.token_id in EOS_IDS, output.finish_reason) == (True, FinishReason.STOP)


def test_min_tokens_hold_until_the_match_is_complete(build, drive, request_of, prompt_of):
    words = Grammar(GrammarKind.REGEX, "(ab ){2,30}")
    driver = drive(build())
    sampling = {"grammar": words, "max_tokens": 80, "logit_bias": ((2, 100.0),)}
    [short] = driver.generate(request_of(prompt_of(5), **sampling))
    [longer] = driver.generate(request_of(prompt_of(5), **sampling, min_tokens=12))
    [complete] = driver.generate(request_of(prompt_of(5), **sampling, min_tokens=80))
    assert len(short) <= 12 < len(longer) < len(complete) < 80
    assert short[-1] == longer[-1] == complete[-1] == 2


def test_ends_are_not_drawn_before_min_tokens(build, drive, request_of, prompt_of):
    driver = drive(build())
    sampling = {"ignore_eos": False, "logit_bias": ((2, 100.0), (0, 99.0), (7, 98.0)), "stop_token_ids": (7,)}
    assert driver.generate(request_of(prompt_of(5), **sampling)) == [[2]]
    [tokens] = driver.generate(request_of(prompt_of(5), **sampling, min_tokens=4))
    assert len(tokens) == 5
    assert not {0, 2, 7} & set(tokens[:4])
    assert tokens[-1] == 2


def test_logprobs_are_those_of_the_free_model(build, drive, request_of, prompt_of):
    driver = drive(build())
    free = request_of(prompt_of(5), num_logprobs=5, max_tokens=1)
    bound = request_of(prompt_of(5), num_logprobs=5, max_tokens=1, grammar=GRAMMARS["object"])
    driver.engine.submit(free, "free")
    driver.engine.submit(bound, "bound")
    driver.run()
    [[first], [second]] = driver.outputs["free"], driver.outputs["bound"]
    assert first.token_id != second.token_id
    assert first.logprobs.top == second.logprobs.top
    assert second.logprobs.chosen < first.logprobs.chosen


def test_a_sequence_that_meets_a_limit_fails_alone(build, drive, request_of, prompt_of):
    ambiguous = Grammar(GrammarKind.LARK, 'start: e\ne: e e | "a" | "b" | "c" |')
    driver = drive(build(grammar=GrammarLimits(step_max_items=2000)))
    requests = requests_of(request_of, prompt_of)
    expected = drive(build()).generate(*requests)
    driver.engine.submit(request_of(prompt_of(9), grammar=ambiguous, min_tokens=90, max_tokens=100), "stuck")
    for index, request in enumerate(requests):
        driver.engine.submit(request, f"{index}")
    driver.run()
    [failure] = driver.failures
    assert (failure.key, failure.field) == ("stuck", "sampling.grammar")
    assert "Too many items" in failure.message
    assert [driver.tokens(f"{index}") for index in range(len(requests))] == expected
    assert driver.engine.load().num_held_blocks == 0


def test_a_bad_grammar_is_refused_when_it_comes_and_holds_nothing(build, request_of, prompt_of):
    engine = build()
    bad = request_of(prompt_of(9), grammar=Grammar(GrammarKind.LARK, "start: nowhere"))
    for enter in (engine.submit, engine.submit_prefill, engine.reserve):
        with pytest.raises(InvalidRequest, match="nowhere") as refusal:
            enter(bad, "a")
        assert refusal.value.field == "sampling.grammar"
        with pytest.raises(InvalidRequest, match="grammar"):
            enter(request_of(prompt_of(9), grammar=GRAMMARS["regex"], outputs=[5, 6]), "a")
    engine.check()
    assert engine.load().num_empty_blocks == engine.info.num_blocks
    assert (engine.load().num_reserved, engine.load().num_waiting) == (0, 0)


def test_no_grammar_is_compiled_where_there_is_no_room(build, request_of, prompt_of):
    bad = request_of(prompt_of(9), grammar=Grammar(GrammarKind.LARK, "start: nowhere"))
    with pytest.raises(Overloaded):
        build(max_waiting=0).submit_prefill(bad, "a")
    with pytest.raises(InvalidRequest, match="prompt_token_ids"):
        build().submit(request_of([VOCAB_SIZE], grammar=bad.sampling.grammar), "a")
