"""The Responses API: one piece, events, parsed output, tools, and earlier output given back as input."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI
from openai.types.responses import Response
from pydantic import BaseModel, Field

QUESTION = "Name a river."


class River(BaseModel):
    name: str = Field(max_length=12)
    length_km: int = Field(ge=0, le=9999)


TOOL: dict[str, Any] = {
    "type": "function",
    "name": "get_length",
    "description": "The length of a river.",
    "parameters": {
        "type": "object",
        "properties": {"river": {"type": "string", "maxLength": 12}},
        "required": ["river"],
        "additionalProperties": False,
    },
    "strict": True,
}
ONE_CALL: dict[str, Any] = {
    "tools": [TOOL],
    "tool_choice": {"type": "function", "name": "get_length"},
    "max_output_tokens": 60,
}
Respond = Any


@pytest.fixture(scope="module")
def fields(model: str) -> dict[str, Any]:
    return {"model": model, "temperature": 0, "max_output_tokens": 12, "input": QUESTION}


@pytest.fixture(scope="module")
def respond(client: OpenAI, fields: dict[str, Any]) -> Respond:
    def respond(**more: Any) -> Response:
        return client.responses.create(**{**fields, **more})

    return respond


def test_a_response_is_the_chat_completion_of_the_same_words(respond: Respond, ask: Any) -> None:
    response, answer = respond(), ask(QUESTION)
    assert response.output_text == answer.choices[0].message.content
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.input_tokens == answer.usage.prompt_tokens
    assert response.usage.output_tokens == 12
    assert response.usage.total_tokens == response.usage.input_tokens + 12
    told = ask([{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTION}])
    assert respond(instructions="Be short.").output_text == told.choices[0].message.content


def test_earlier_output_items_go_on_as_input(respond: Respond, ask: Any) -> None:
    first = respond()
    question = {"role": "user", "content": QUESTION}
    turns = [question, *first.output, {"role": "user", "content": "Another one?"}]
    chat = [question, {"role": "assistant", "content": first.output_text}, turns[-1]]
    expected = ask(chat).choices[0].message.content
    assert respond(input=turns).output_text == expected
    as_dicts = [question, *(item.model_dump() for item in first.output), turns[-1]]
    assert respond(input=as_dicts).output_text == expected


def test_events_build_the_response(client: OpenAI, fields: dict[str, Any], respond: Respond) -> None:
    with client.responses.create(**fields, stream=True) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-4].text == events[-1].response.output_text == respond().output_text
    assert events[0].response.id == events[-1].response.id
    assert events[0].response.status == "in_progress"


def test_the_sdks_stream_helper_gives_the_parsed_response(client: OpenAI, fields: dict[str, Any]) -> None:
    fields = {**fields, "max_output_tokens": 80, "input": "Describe the Rhine as JSON.", "text_format": River}
    with client.responses.stream(**fields) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        streamed = stream.get_final_response()
    whole = client.responses.parse(**fields)
    assert whole.status == "completed"
    assert isinstance(whole.output_parsed, River)
    assert streamed.output_parsed == whole.output_parsed == River.model_validate_json(text)


def test_logprobs_are_included_when_asked_for(respond: Respond) -> None:
    part = respond(include=["message.output_text.logprobs"], top_logprobs=2).output[0].content[0]
    assert b"".join(bytes(entry.bytes) for entry in part.logprobs).decode() == part.text
    assert {len(entry.top_logprobs) for entry in part.logprobs} == {2}


def test_a_function_call_and_its_result(client: OpenAI, fields: dict[str, Any], respond: Respond) -> None:
    first = respond(**ONE_CALL)
    (call,) = first.output
    assert (call.type, call.name, call.status) == ("function_call", "get_length", "completed")
    with client.responses.stream(**{**fields, **ONE_CALL}) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        (streamed,) = stream.get_final_response().output
    assert "".join(deltas) == streamed.arguments == call.arguments
    told = {"type": "function_call_output", "call_id": call.call_id, "output": "1233 km"}
    turns = [{"role": "user", "content": QUESTION}, *first.output, told]
    last = respond(input=turns, tools=[TOOL], tool_choice="none")
    assert last.output[0].type == "message"
    assert last.output_text
    parsed = [{"role": "user", "content": QUESTION}, streamed, {**told, "call_id": streamed.call_id}]
    assert respond(input=parsed, tools=[TOOL], tool_choice="none").output_text == last.output_text
