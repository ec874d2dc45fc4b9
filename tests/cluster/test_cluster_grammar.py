"""Grammars through real processes: as the engine alone, and nothing left behind by one that is refused."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from kvrelay.core.errors import InvalidRequest
from kvrelay.core.request import FinishReason, TokenRequest
from kvrelay.core.sampling import Grammar, GrammarKind, SamplingParams
from kvrelay.engine.embedded_model import ensure_smollm2

pytestmark = [pytest.mark.cluster, pytest.mark.model]

PATTERN = r"(19|20)\d\d-(0[1-9]|1[0-2])"
SCHEMA = {
    "$defs": {"color": {"type": "string", "enum": ["red", "green", "blue"]}},
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "favourite": {"anyOf": [{"$ref": "#/$defs/color"}, {"type": "null"}]},
    },
    "required": ["name", "age", "favourite"],
    "additionalProperties": False,
}
GRAMMARS = [
    Grammar(GrammarKind.JSON_OBJECT),
    Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)),
    Grammar(GrammarKind.REGEX, PATTERN),
    Grammar(GrammarKind.LARK, f'start: "<call>" %json {json.dumps(SCHEMA)} "</call>"'),
]
BAD = Grammar(GrammarKind.LARK, "start: nowhere")
QUESTIONS = [
    "Describe a person as JSON, with name and age.",
    "Who was the first on the moon, and when?",
]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return ensure_smollm2()


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


@pytest.fixture(scope="module")
def cluster(module_starter, smollm2: Path):
    return module_starter.start(1, 1, ["--model", str(smollm2), "--dtype", "float32", "--num-blocks", "512"])


def prompt_of(tokenizer: Tokenizer, question: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").ids)


def check_answer(grammar: Grammar, text: str) -> None:
    if grammar.kind is GrammarKind.REGEX:
        assert re.fullmatch(PATTERN, text)
        return
    found = json.loads(text.removeprefix("<call>").removesuffix("</call>"))
    assert isinstance(found, dict)
    if grammar.kind is not GrammarKind.JSON_OBJECT:
        assert list(found) == ["name", "age", "favourite"]
        assert isinstance(found["name"], str)
        assert 0 <= found["age"] <= 150
        assert found["favourite"] in ("red", "green", "blue", None)


async def test_answers_match_their_grammar_and_are_those_of_the_engine_alone(
    cluster, run_alone, smollm2: Path, tokenizer: Tokenizer
) -> None:
    requests = [
        TokenRequest(prompt, len(prompt), SamplingParams(max_tokens=90, grammar=grammar, **sampling))
        for prompt in (prompt_of(tokenizer, question) for question in QUESTIONS)
        for grammar in GRAMMARS
        for sampling in ({}, SAMPLED)
    ]
    async with cluster.client() as client:
        results = await asyncio.gather(
            *(client.complete(request.token_ids, sampling=request.sampling) for request in requests)
        )
        assert all(result.report.kv_messages for result in results), "each was handed off"
    assert [result.token_ids for result in results] == run_alone(smollm2, requests)
    ended = [result.finish_reason is FinishReason.STOP for result in results]
    assert sum(ended) > len(ended) / 2
    for request, result, is_whole in zip(requests, results, ended, strict=True):
        if is_whole:
            check_answer(request.sampling.grammar, tokenizer.decode(list(result.token_ids)))
    await cluster.wait_idle()


async def test_an_answer_whose_decode_node_dies_goes_on_in_its_grammar(
    starter, run_alone, smollm2: Path, tokenizer: Tokenizer
) -> None:
    """Counted words: a continuation that began the match anew would end too late."""
    node_args = ["--model", str(smollm2), "--dtype", "float32", "--num-blocks", "128"]
    cluster = starter.start(1, 2, node_args)
    prompt, words = prompt_of(tokenizer, QUESTIONS[1]), Grammar(GrammarKind.REGEX, "([a-z]{1,8} ){60}")
    sampling = SamplingParams(max_tokens=300, grammar=words, ignore_eos=True, **SAMPLED)
    tokens: list[int] = []
    async with cluster.client() as client:
        stream = client.generate(prompt, sampling=sampling)
        async for chunk in stream:
            if len(tokens) < 20 <= len(tokens) + len(chunk.token_ids):
                state = await client.cluster_state()
                [victim] = [node for node in state.nodes if node.role == "decode" and node.num_attempts]
                await asyncio.to_thread(cluster.nodes[victim.node_id].kill)
            tokens.extend(chunk.token_ids)
    assert stream.result.report.num_attempts == 2
    assert stream.result.finish_reason is FinishReason.STOP
    assert len(tokenizer.decode(tokens).split()) == 60
    assert [tuple(tokens)] == run_alone(smollm2, [TokenRequest(prompt, len(prompt), sampling)])
    await cluster.wait_idle()


async def test_a_bad_grammar_is_the_callers_fault_and_leaves_nothing_held(
    cluster, tokenizer: Tokenizer
) -> None:
    prompt = prompt_of(tokenizer, QUESTIONS[0])
    async with cluster.client() as client:
        good = client.complete(prompt, sampling=SamplingParams(max_tokens=8))
        refusals = [
            client.complete(prompt, sampling=SamplingParams(max_tokens=8, grammar=BAD)) for _ in range(12)
        ]
        answer, *errors = await asyncio.gather(good, *refusals, return_exceptions=True)
    assert len(answer.token_ids) == 8
    for error in errors:
        assert isinstance(error, InvalidRequest)
        assert error.field == "sampling.grammar"
        assert "nowhere" in error.message
    state = await cluster.wait_idle()
    assert sum(node.load.num_held_blocks for node in state.nodes) == 0


async def test_the_simulated_engine_refuses_what_it_can_not_do_by_name(starter) -> None:
    cluster = starter.start(1, 1, ["--model=sim", "--num-blocks=256"])
    async with cluster.client() as client:
        for name, value in (("grammar", GRAMMARS[0]), ("logit_bias", ((5, 1.0),))):
            with pytest.raises(InvalidRequest) as refusal:
                await client.complete([1, 2, 3], sampling=SamplingParams(max_tokens=4, **{name: value}))
            assert refusal.value.field == f"sampling.{name}"
        answer = await client.complete([1, 2, 3], sampling=SamplingParams(max_tokens=4, min_tokens=4))
        assert len(answer.token_ids) == 4
    await cluster.wait_idle()
