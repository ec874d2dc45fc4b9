"""Structured output: what comes is what the schema allows, parsed by the SDK itself."""

from __future__ import annotations

import json
import re
from enum import StrEnum

from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from .conftest import Ask, greedy

QUESTION = "Describe Bob, who is 30 years old and likes blue, as JSON."


class Color(StrEnum):
    RED = "red"
    BLUE = "blue"


class Person(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)
    favourite: Color


FIELDS = {"response_format": Person, "max_tokens": 80}


def test_a_pydantic_model_is_parsed(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(**greedy(model, QUESTION, **FIELDS))
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person)
    assert answer.choices[0].finish_reason == "stop"
    assert Person.model_validate_json(answer.choices[0].message.content) == person


async def test_a_stream_is_parsed_to_the_same(client: OpenAI, async_client: AsyncOpenAI, model: str) -> None:
    async with async_client.chat.completions.stream(**greedy(model, QUESTION, **FIELDS)) as stream:
        streamed = (await stream.get_final_completion()).choices[0].message
    whole = client.chat.completions.parse(**greedy(model, QUESTION, **FIELDS)).choices[0].message
    assert streamed.content == whole.content
    assert streamed.parsed == whole.parsed


def test_any_json_object(ask: Ask, token_id_of: Ask) -> None:
    """The model is pushed to end as soon as it may, which is after an empty object."""
    bias = {token_id_of("}"): 100, token_id_of("<|im_end|>"): 100}
    answer = ask(QUESTION, response_format={"type": "json_object"}, logit_bias=bias).choices[0]
    assert (json.loads(answer.message.content), answer.finish_reason) == ({}, "stop")


def test_a_pattern_and_a_choice(ask: Ask, ask_streamed: Ask) -> None:
    pattern = r"(19|20)\d\d-(0[1-9]|1[0-2])"
    fields = {"extra_body": {"structured_outputs": {"regex": pattern}}}
    assert re.fullmatch(pattern, ask("When?", **fields).choices[0].message.content)
    choices = ["the Rhine (east)", "the Rhône + more", "a.b|c"]
    fields = {"extra_body": {"structured_outputs": {"choice": choices}}, "max_tokens": 20}
    for seed in range(3):
        text = ask_streamed("Which?", **fields, temperature=1.5, seed=seed).text()
        assert text in choices
