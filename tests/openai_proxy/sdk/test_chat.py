"""Chat completions: the same answer in one piece and as a stream, and every field that shapes it."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest
from openai import AsyncOpenAI, OpenAI

from .conftest import QUESTION, Ask, Streamed, greedy

EOS = "2"
"""``<|im_end|>``, the token that ends an answer."""


def test_a_stream_adds_up_to_the_answer_in_one_piece(ask: Ask, ask_streamed: Ask) -> None:
    whole, streamed = ask(), ask_streamed()
    assert whole.choices[0].message.content
    assert whole.choices[0].message.role == "assistant"
    assert streamed.text() == whole.choices[0].message.content
    assert streamed.finish_reasons == {0: whole.choices[0].finish_reason} == {0: "length"}
    assert len(streamed.pieces[0]) > 1
    assert streamed.chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in streamed.chunks} == {streamed.chunks[0].id}
    assert all(chunk.usage is None for chunk in streamed.chunks)


async def test_the_asynchronous_client_gets_the_same(async_client: AsyncOpenAI, model: str, ask: Ask) -> None:
    async def streamed() -> str:
        chunks = await async_client.chat.completions.create(stream=True, **greedy(model))
        return Streamed([chunk async for chunk in chunks]).text()

    whole, first, second = await asyncio.gather(
        async_client.chat.completions.create(**greedy(model)), streamed(), streamed()
    )
    expected = (await asyncio.to_thread(ask)).choices[0].message.content
    assert [whole.choices[0].message.content, first, second] == [expected] * 3


def test_usage_counts_the_same_in_a_stream(ask: Ask, ask_streamed: Ask) -> None:
    whole = ask().usage
    streamed = ask_streamed(stream_options={"include_usage": True})
    last = streamed.chunks[-1]
    assert last.choices == []
    assert all(chunk.usage is None for chunk in streamed.chunks[:-1])
    for usage in (whole, last.usage):
        assert usage.completion_tokens == 12
        assert usage.total_tokens == usage.prompt_tokens + 12
        assert usage.prompt_tokens == whole.prompt_tokens


def test_a_prompt_that_comes_again_is_found_in_the_cache(ask: Ask) -> None:
    question = f"{uuid4()}: which of these is a river? " + "Rhine, Rhone, Aare, Inn. " * 12
    first, second = (ask(question, max_tokens=2).usage for _ in range(2))
    assert second.prompt_tokens == first.prompt_tokens
    assert second.prompt_tokens_details.cached_tokens > first.prompt_tokens_details.cached_tokens
    assert second.prompt_tokens - 32 <= second.prompt_tokens_details.cached_tokens < second.prompt_tokens


def test_another_cache_salt_shares_no_cached_prefix(ask: Ask) -> None:
    question = f"{uuid4()}: which of these is a river? " + "Rhine, Rhone, Aare, Inn. " * 4
    salts = [str(uuid4()) for _ in range(2)]
    cached = [
        ask(question, max_tokens=2, extra_body={"cache_salt": salt}).usage.prompt_tokens_details.cached_tokens
        for salt in (*salts, salts[0])
    ]
    assert cached[:2] == [0, 0]
    assert cached[2] > 0


def test_two_greedy_choices_are_both_the_one_answer(ask: Ask, ask_streamed: Ask) -> None:
    expected = ask().choices[0].message.content
    whole, streamed = ask(n=2), ask_streamed(n=2, stream_options={"include_usage": True})
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert [choice.message.content for choice in whole.choices] == [expected] * 2
    assert [streamed.text(index) for index in range(2)] == [expected] * 2
    assert streamed.finish_reasons == {0: "length", 1: "length"}
    for usage in (whole.usage, streamed.chunks[-1].usage):
        assert usage.completion_tokens == 24
        assert usage.prompt_tokens == ask().usage.prompt_tokens


def test_a_seed_gives_the_same_choices_again_and_different_ones_at_once(ask: Ask, ask_streamed: Ask) -> None:
    def texts(seed: int) -> list[str]:
        return [choice.message.content for choice in ask(temperature=1.2, seed=seed, n=2).choices]

    first = texts(11)
    assert texts(11) == first
    streamed = ask_streamed(temperature=1.2, seed=11, n=2)
    assert [streamed.text(index) for index in range(2)] == first
    assert first[0] != first[1]
    assert texts(12) != first


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_token_limit_hold(client: OpenAI, model: str, field: str) -> None:
    fields = greedy(model)
    del fields["max_tokens"]
    answer = client.chat.completions.create(**fields, **{field: 3})
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


def test_an_answer_without_a_limit_ends_by_itself(client: OpenAI, model: str) -> None:
    fields = greedy(model, logit_bias={EOS: 100})
    del fields["max_tokens"]
    answer = client.chat.completions.create(**fields)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == ""
    assert answer.usage.completion_tokens == 1


def test_min_tokens_and_ignore_eos_put_the_end_off(ask: Ask, ask_streamed: Ask) -> None:
    ended = ask(logit_bias={EOS: 100}, extra_body={"min_tokens": 4})
    assert (ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("stop", 5)
    assert "<|im_end|>" not in ended.choices[0].message.content
    ignored = ask(logit_bias={EOS: 100}, extra_body={"ignore_eos": True})
    assert (ignored.choices[0].finish_reason, ignored.usage.completion_tokens) == ("length", 12)
    assert ask_streamed(logit_bias={EOS: 100}, extra_body={"ignore_eos": True}).finish_reasons == {
        0: "length"
    }


def test_logit_bias_forces_and_bans_a_token(ask: Ask, token_id_of: Any) -> None:
    assert (
        ask(logit_bias={token_id_of(" river"): 100}, max_tokens=3).choices[0].message.content == " river" * 3
    )
    logprobs = ask(logprobs=True, max_tokens=1).choices[0].logprobs
    first = logprobs.content[0].token
    assert ask(logit_bias={token_id_of(first): -100}, max_tokens=1).choices[0].message.content != first


def test_a_system_prompt_parts_and_a_longer_conversation_reach_the_model(ask: Ask) -> None:
    def answer(*turns: tuple[str, Any]) -> str:
        return ask([{"role": role, "content": content} for role, content in turns]).choices[0].message.content

    plain = answer(("system", "Answer in French."), ("user", QUESTION))
    parts = [{"type": "text", "text": "Name three"}, {"type": "text", "text": " rivers."}]
    assert answer(("developer", "Answer in French."), ("user", parts)) == plain
    assert answer(("user", QUESTION)) != plain
    turns = (("user", QUESTION), ("assistant", "Rhine."), ("user", "Another one?"))
    assert answer(*turns) != answer(turns[0], turns[2])
