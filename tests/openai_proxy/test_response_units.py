"""Responses: the chat that a request amounts to, and the events that build its answer."""

from __future__ import annotations

from typing import Any

import pytest

from kvrelay.openai_proxy.errors import ApiError
from kvrelay.openai_proxy.response_events import ResponseOutput
from kvrelay.openai_proxy.response_input import as_chat
from kvrelay.openai_proxy.response_object import response_object
from kvrelay.openai_proxy.schema.chat import ChatBody, NamedTool
from kvrelay.openai_proxy.schema.responses import ResponseBody
from kvrelay.openai_proxy.tool_calls.hermes import HermesParser

CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "5"}
F = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}


def chat(**fields: Any) -> ChatBody:
    return as_chat(ResponseBody.model_validate({"input": "hi", **fields}))


def turns(*items: dict[str, Any], **fields: Any) -> list[tuple[str, object, int]]:
    """Role, content and number of calls of each message."""
    made = chat(input=list(items), **fields).messages
    return [(message.role, message.content, len(message.tool_calls or ())) for message in made]


def test_text_is_one_user_turn_after_the_instructions() -> None:
    made = chat(instructions="Be kind.")
    assert [(message.role, message.content) for message in made.messages] == [
        ("system", "Be kind."),
        ("user", "hi"),
    ]


def test_calls_join_the_assistants_turn_and_their_results_are_tool_turns() -> None:
    user = {
        "role": "user",
        "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
    }
    words = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hm."}]}
    found = turns(user, words, CALL, {**CALL, "call_id": "c2"}, OUTPUT, CALL)
    assert found == [("user", "ab", 0), ("assistant", "Hm.", 2), ("tool", "5", 0), ("assistant", None, 1)]
    assert chat(input=[CALL, OUTPUT]).messages[1].tool_call_id == "c1"


def test_limits_sampling_tools_and_format_arrive() -> None:
    made = chat(
        max_output_tokens=9, temperature=0.5, top_p=0.5, tools=[F],
        tool_choice={"type": "function", "name": "f"}, parallel_tool_calls=False, top_logprobs=3, user="u",
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
    )  # fmt: skip
    assert (made.max_completion_tokens, made.temperature, made.top_p, made.user) == (9, 0.5, 0.5, "u")
    assert (made.logprobs, made.top_logprobs, made.parallel_tool_calls) == (True, 3, False)
    assert isinstance(made.tool_choice, NamedTool)
    assert (made.tools[0].function.name, made.tools[0].function.strict) == ("f", True)
    assert made.response_format is not None
    assert made.response_format.json_schema is not None
    assert made.response_format.json_schema.schema_ == {"type": "object"}


def test_nothing_asked_for_is_nothing_asked_for() -> None:
    made = chat()
    assert (made.tools, made.tool_choice, made.response_format, made.logprobs) == ([], None, None, False)
    assert (made.max_completion_tokens, made.temperature) == (None, 1.0)
    assert chat(include=["message.output_text.logprobs"]).logprobs


@pytest.mark.parametrize(
    "fields",
    [
        {"instructions": "x", "input": [{"role": "user", "content": "a"}] * 4096},
        {"input": [CALL] * 129},
    ],
)
def test_a_conversation_larger_than_a_chat_may_be_is_refused_naming_input(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, "input")


class Events:
    """Collects what is emitted."""

    def __init__(self) -> None:
        self.all: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, kind: str, value: dict[str, Any]) -> bytes:
        self.all.append((kind.removeprefix("response."), value))
        return b"."

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.all]


TEXT_BEGINS = ["output_item.added", "content_part.added"]
TEXT_ENDS = ["output_text.done", "content_part.done", "output_item.done"]
CALL_ENDS = ["function_call_arguments.done", "output_item.done"]


def test_text_comes_as_one_message_in_the_documented_order() -> None:
    output, emit = ResponseOutput(None), Events()
    assert output.add("a", [], emit) == b"..."
    assert output.add("", [], emit) == b""
    output.add("b", [], emit)
    output.end("completed", emit)
    assert emit.kinds() == [*TEXT_BEGINS, "output_text.delta", "output_text.delta", *TEXT_ENDS]
    (item,) = output.items
    assert (item["status"], item["content"][0]["text"]) == ("completed", "ab")
    assert {value.get("item_id", item["id"]) for _, value in emit.all} == {item["id"]}
    assert emit.all[0][1]["item"]["content"] == []


def test_words_and_calls_are_items_of_their_own() -> None:
    output, emit = ResponseOutput(HermesParser()), Events()
    for part in ("Hm. <tool_call>", '{"name": "f", "arguments": {"x": 1}}</tool_call>'):
        output.add(part, [], emit)
    output.add('<tool_call>{"name": "g"}</tool_call>', [], emit)
    output.end("completed", emit)
    assert emit.kinds() == [
        *TEXT_BEGINS, "output_text.delta", *TEXT_ENDS,
        "output_item.added", "function_call_arguments.delta", *CALL_ENDS,
        "output_item.added", *CALL_ENDS,
    ]  # fmt: skip
    assert [item["type"] for item in output.items] == ["message", "function_call", "function_call"]
    assert [item.get("arguments") for item in output.items] == [None, '{"x": 1}', "{}"]
    assert [value["output_index"] for kind, value in emit.all if kind == "output_item.done"] == [0, 1, 2]


def test_an_answer_of_no_words_is_an_empty_message() -> None:
    output, emit = ResponseOutput(None), Events()
    output.end("incomplete", emit)
    assert emit.kinds() == [*TEXT_BEGINS, *TEXT_ENDS]
    assert output.items[0]["status"] == "incomplete"


def test_only_the_last_item_of_a_cut_answer_is_incomplete() -> None:
    output, emit = ResponseOutput(HermesParser()), Events()
    output.add('Hm. <tool_call>{"name": "f", "arguments": {"x"', [], emit)
    output.end("incomplete", emit)
    assert [item["status"] for item in output.items] == ["completed", "incomplete"]


def test_logprobs_gather_in_the_part_and_come_with_their_delta() -> None:
    output, emit = ResponseOutput(None), Events()
    output.add("a", [{"token": "a"}], emit)
    output.add("", [{"token": "b"}], emit)
    output.end("completed", emit)
    assert [value["logprobs"] for kind, value in emit.all if kind == "output_text.delta"] == [
        [{"token": "a"}],
        [{"token": "b"}],
    ]
    assert output.items[0]["content"][0]["logprobs"] == [{"token": "a"}, {"token": "b"}]


def test_a_response_shows_what_was_asked_for() -> None:
    body = ResponseBody.model_validate(
        {"input": "hi", "tools": [F], "metadata": {"a": "b"}, "max_output_tokens": 5}
    )
    shown = response_object(body, "resp_1", 17, "m", [], None)
    assert (shown["status"], shown["usage"], shown["error"]) == ("in_progress", None, None)
    assert (shown["tools"], shown["metadata"], shown["max_output_tokens"]) == ([F], {"a": "b"}, 5)
    assert (shown["text"], shown["tool_choice"]) == ({"format": {"type": "text"}}, "auto")
