"""Request bodies: what is refused is named by its path, what is null is left out."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from kvrelay.openai_proxy.errors import ApiError, from_validation
from kvrelay.openai_proxy.schema.chat import ChatBody
from kvrelay.openai_proxy.schema.completions import CompletionBody
from kvrelay.openai_proxy.schema.responses import ResponseBody
from kvrelay.openai_proxy.schema.tokens import DetokenizeBody, TokenizeBody

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
CHAT: dict[str, Any] = {"model": "m", "messages": [USER]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hi"}
RESPONSE: dict[str, Any] = {"model": "m", "input": "hi"}


def refusal(kind: type[BaseModel], body: dict[str, Any]) -> ApiError:
    """What a caller is told, as the web framework passes the faults on."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in caught.value.errors()]
    error = from_validation(faults)
    assert error.status == 400
    assert error.type == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (ChatBody, {}, "messages"),
        (ChatBody, {"messages": []}, "messages"),
        (ChatBody, {"messages": "hi"}, "messages"),
        (ChatBody, {"messages": ["hi"]}, "messages[0]"),
        (ChatBody, {"messages": [{"content": "hi"}]}, "messages[0].role"),
        (ChatBody, {"messages": [USER, {"role": "king", "content": "x"}]}, "messages[1].role"),
        (ChatBody, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (ChatBody, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            ChatBody,
            {"messages": [{**USER, "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages[0].tool_calls",
        ),
        (
            ChatBody,
            {
                "messages": [
                    USER,
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
                ]
            },
            "messages[1].content[1].type",
        ),
        (
            ChatBody,
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}]},
            "messages[0].tool_calls[0].function.name",
        ),
        (ChatBody, {**CHAT, "temperature": "0"}, "temperature"),
        (ChatBody, {**CHAT, "temperature": -1}, "temperature"),
        (ChatBody, {**CHAT, "temperature": float("nan")}, "temperature"),
        (ChatBody, {**CHAT, "max_tokens": 0}, "max_tokens"),
        (ChatBody, {**CHAT, "max_tokens": 2.0}, "max_tokens"),
        (ChatBody, {**CHAT, "stream": 1}, "stream"),
        (ChatBody, {**CHAT, "stream_options": {}}, "stream_options"),
        (ChatBody, {**CHAT, "stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        (ChatBody, {**CHAT, "stop": ["a", ""]}, "stop[1]"),
        (ChatBody, {**CHAT, "stop": ["a"] * 17}, "stop"),
        (ChatBody, {**CHAT, "top_logprobs": 2}, "top_logprobs"),
        (ChatBody, {**CHAT, "tool_choice": "required"}, "tool_choice"),
        (ChatBody, {**CHAT, "tools": [TOOL, TOOL]}, "tools"),
        (
            ChatBody,
            {
                **CHAT,
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"minimum": float("nan")}}}
                ],
            },
            "tools[0].function.parameters",
        ),
        (ChatBody, {**CHAT, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        (ChatBody, {**CHAT, "tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
        (
            ChatBody,
            {**CHAT, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        (
            ChatBody,
            {**CHAT, "tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
        ),
        (ChatBody, {**CHAT, "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (ChatBody, {**CHAT, "structured_outputs": {}}, "structured_outputs"),
        (ChatBody, {**CHAT, "structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        (ChatBody, {**CHAT, "structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        (ChatBody, {**CHAT, "modalities": ["audio"]}, "modalities[0]"),
        (ChatBody, {**CHAT, "logit_bias": {"5": "x"}}, "logit_bias"),
        (CompletionBody, {}, "prompt"),
        (CompletionBody, {"prompt": []}, "prompt"),
        (CompletionBody, {"prompt": 5}, "prompt"),
        (CompletionBody, {**TEXT, "echo": True, "logprobs": 1}, "echo"),
        (CompletionBody, {**TEXT, "logprobs": 21}, "logprobs"),
        (CompletionBody, {**TEXT, "n": 0}, "n"),
        (ResponseBody, {"input": []}, "input"),
        (
            ResponseBody,
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        (ResponseBody, {**RESPONSE, "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        (
            ResponseBody,
            {**RESPONSE, "text": {"format": {"type": "json_schema", "schema": {}, "name": "a b"}}},
            "text.format.name",
        ),
        (ResponseBody, {**RESPONSE, "tool_choice": "required"}, "tool_choice"),
        (ResponseBody, {**RESPONSE, "tools": [{"type": "function", "name": "g"}] * 2}, "tools"),
        (ResponseBody, {**RESPONSE, "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        (
            ResponseBody,
            {
                **RESPONSE,
                "tools": [{"type": "function", "name": "g"}],
                "tool_choice": {"type": "function", "name": "f"},
            },
            "tool_choice",
        ),
        (ResponseBody, {**RESPONSE, "store": True}, "store"),
        (TokenizeBody, {}, "prompt"),
        (TokenizeBody, {"prompt": "a", "messages": [USER]}, "prompt"),
        (DetokenizeBody, {"tokens": [5, -1]}, "tokens[1]"),
    ],
)
def test_the_field_at_fault_is_named_by_its_path(
    kind: type[BaseModel], body: dict[str, Any], param: str
) -> None:
    error = refusal(kind, body)
    assert error.param == param
    assert param in error.message


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (ChatBody, {**CHAT, "best_of": 2}, "best_of"),
        (ChatBody, {**CHAT, "maxTokens": 2}, "maxTokens"),
        (ChatBody, {**CHAT, "body": 2}, "body"),
        (ChatBody, {**CHAT, "a b": 2}, "a b"),
        (ChatBody, {"messages": [{**USER, "Audio": {}}]}, "messages[0].Audio"),
        (ChatBody, {**CHAT, "tools": [{**TOOL, "cache": 1}]}, "tools[0].cache"),
        (CompletionBody, {**TEXT, "suffix": "x"}, "suffix"),
        (ResponseBody, {**RESPONSE, "previous_response_id": "x"}, "previous_response_id"),
        (TokenizeBody, {"prompt": "a", "x": 1}, "x"),
    ],
)
def test_a_field_that_is_not_known_is_refused_by_name(
    kind: type[BaseModel], body: dict[str, Any], param: str
) -> None:
    error = refusal(kind, body)
    assert (error.param, error.code) == (param, "unsupported_parameter")
    assert error.message.startswith(param)


def test_the_name_of_an_unknown_field_is_not_repeated_without_end() -> None:
    assert len(refusal(ChatBody, {**CHAT, "x" * 100_000: 1}).message) < 500


def test_null_is_left_out_anywhere() -> None:
    nulls = dict.fromkeys(ChatBody.model_fields.keys() - {"messages"})
    message = {**USER, "name": None, "tool_calls": None, "tool_call_id": None}
    assert ChatBody.model_validate({**nulls, "messages": [message]}) == ChatBody.model_validate(
        {"messages": [USER]}
    )
    nulls = dict.fromkeys(ResponseBody.model_fields.keys() - {"input"})
    assert ResponseBody.model_validate({**nulls, "input": "hi"}) == ResponseBody.model_validate(
        {"input": "hi"}
    )
    assert refusal(ChatBody, {"messages": None}).param == "messages"


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_a_prompt_is_one_or_several_of_text_or_token_ids(given: object, prompts: list[Any]) -> None:
    assert CompletionBody.model_validate({"prompt": given}).prompt == prompts


@pytest.mark.parametrize("given", [[True, False], [1, "a"], [["a"]], [[1], "a"], {"a": 1}])
def test_a_prompt_that_is_a_mixture_is_refused(given: object) -> None:
    param = refusal(CompletionBody, {"prompt": given}).param
    assert param is not None
    assert param.startswith("prompt")


def test_one_stop_string_counts_as_a_list_of_one() -> None:
    assert ChatBody.model_validate({**CHAT, "stop": "x"}).stop == ["x"]


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (
            [{"type": "json_invalid", "loc": ("body", 3), "ctx": {"error": "Expecting value"}}],
            "Expecting value",
        ),
        ([{"type": "missing", "loc": ("body",), "msg": "Field required"}], "Field required"),
    ],
)
def test_a_body_that_is_no_object_is_told_so(faults: list[dict[str, Any]], message: str) -> None:
    error = from_validation(faults)
    assert message in error.message
    assert error.param is None
