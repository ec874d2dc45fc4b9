"""Function tools: forced, named or forbidden calls, the same in a stream, and their results."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI, pydantic_function_tool
from openai.types.chat import ParsedFunctionToolCall
from pydantic import BaseModel, Field

from .conftest import Ask, greedy

QUESTION = "What is the weather in Paris?"


class GetWeather(BaseModel):
    """Tell the weather of a city."""

    city: str = Field(max_length=12)
    unit: str = Field(pattern="^[CF]$")


class GetTime(BaseModel):
    """Tell the time of a zone."""

    zone: str = Field(max_length=12)


TOOLS = [
    pydantic_function_tool(GetWeather, name="get_weather"),
    pydantic_function_tool(GetTime, name="get_time"),
]
TYPES: dict[str, type[BaseModel]] = {"get_weather": GetWeather, "get_time": GetTime}
ONE_CALL: dict[str, Any] = {
    "tools": TOOLS,
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_tokens": 100,
}


def test_a_required_call_is_made_with_arguments_that_fit(ask: Ask) -> None:
    choice = ask(QUESTION, **ONE_CALL).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    TYPES[call.function.name].model_validate_json(call.function.arguments)


@pytest.mark.parametrize("name", TYPES)
def test_a_named_function_is_the_one_that_is_called(ask: Ask, name: str) -> None:
    choice = {"type": "function", "function": {"name": name}}
    answer = ask(QUESTION, **{**ONE_CALL, "tool_choice": choice}).choices[0]
    (call,) = answer.message.tool_calls
    assert call.function.name == name
    TYPES[name].model_validate_json(call.function.arguments)


def test_no_call_is_made_where_none_is_allowed(ask: Ask, ask_streamed: Ask) -> None:
    fields = {"tools": TOOLS, "tool_choice": "none"}
    whole, streamed = ask(QUESTION, **fields).choices[0], ask_streamed(QUESTION, **fields)
    assert whole.message.tool_calls is None
    assert streamed.calls == {}
    assert streamed.text() == whole.message.content == ask(QUESTION).choices[0].message.content


def test_a_free_choice_streams_what_it_gives_in_one_piece(ask: Ask, ask_streamed: Ask) -> None:
    whole, streamed = ask(QUESTION, tools=TOOLS).choices[0], ask_streamed(QUESTION, tools=TOOLS)
    assert streamed.text() == (whole.message.content or "")
    assert len(streamed.calls.get(0, {})) == len(whole.message.tool_calls or ())


def test_streamed_calls_add_up_to_those_in_one_piece(ask: Ask, ask_streamed: Ask) -> None:
    fields = {**ONE_CALL, "parallel_tool_calls": True}
    whole, streamed = ask(QUESTION, **fields).choices[0], ask_streamed(QUESTION, **fields)
    expected = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    calls = streamed.calls[0]
    assert list(calls) == list(range(len(expected)))
    assert [(call["name"], call["arguments"]) for call in calls.values()] == expected
    assert len({call["id"] for call in calls.values()}) == len(expected)
    assert streamed.finish_reasons == {0: whole.finish_reason}
    assert streamed.pieces == {}


def test_the_sdks_own_stream_helper_parses_the_arguments(client: OpenAI, model: str) -> None:
    with client.chat.completions.stream(**greedy(model, QUESTION, **ONE_CALL)) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    (call,) = message.tool_calls
    assert isinstance(call, ParsedFunctionToolCall)
    assert isinstance(call.function.parsed_arguments, TYPES[call.function.name])


def test_a_conversation_goes_on_from_a_tools_result(ask: Ask) -> None:
    question = {"role": "user", "content": QUESTION}
    first = ask([question], **ONE_CALL).choices[0].message
    (call,) = first.tool_calls

    def goes_on(result: str) -> Any:
        told = {"role": "tool", "tool_call_id": call.id, "content": result}
        return ask([question, first, told], tools=TOOLS, tool_choice="none", max_tokens=8)

    sunny, snowy = goes_on(json.dumps({"sky": "sunny"})), goes_on(json.dumps({"sky": "a blizzard, -20 C"}))
    assert sunny.choices[0].message.content
    assert sunny.usage.prompt_tokens != snowy.usage.prompt_tokens
    assert sunny.usage.prompt_tokens_details.cached_tokens > 0
    assert sunny.choices[0].message.tool_calls is None
