"""What can't be served is refused with the SDK's right exception, and the field at fault by its name."""

from __future__ import annotations

from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from .conftest import greedy

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
FUNCTION = {"type": "function", "function": {"name": "f"}}
USER = {"role": "user", "content": "x"}

CHAT = [
    ({"n": 17}, "n"),
    ({"n": 0}, "n"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"seed": 1.5}, "seed"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"logprobs": True, "top_logprobs": 50}, "top_logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [USER, {"role": "user"}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "word " * 9000}]}, "messages"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}}},
        "response_format",
    ),
    ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs"),
    ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, "structured_outputs"),
    ({"extra_body": {"min_tokens": -1}}, "min_tokens"),
    ({"store": True}, "store"),
    ({"service_tier": "scale"}, "service_tier"),
    ({"modalities": ["audio"]}, "modalities[0]"),
]
UNSUPPORTED_IN_CHAT = [
    {"prediction": {"type": "content", "content": "x"}},
    {"reasoning_effort": "low"},
    {"web_search_options": {}},
    {"metadata": {"a": "b"}},
    {"functions": [{"name": "f"}]},
    {"verbosity": "low"},
    {"extra_body": {"of_my_own": 1}},
]
RESPONSES = [
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"input": "word " * 9000}, "input"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
        "input[0].content[0].type",
    ),
    ({"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}, "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "odd"}}}}, "text.format"),
]
UNSUPPORTED_IN_RESPONSES = [
    {"previous_response_id": "resp_1"},
    {"reasoning": {"effort": "low"}},
    {"conversation": "conv_1"},
    {"prompt": {"id": "p"}},
    {"max_tool_calls": 1},
]
COMPLETIONS = [
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [10**8]}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": 1, "echo": True}, "echo"),
    ({"suffix": "a"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"n": 17}, "n"),
    ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs"),
]


def _named(cases: list[Any]) -> list[Any]:
    return [pytest.param(*case, id=f"{index}-{case[1]}") for index, case in enumerate(cases)]


@pytest.mark.parametrize(("fields", "param"), _named(CHAT))
def test_chat_names_the_field_at_fault(client: OpenAI, model: str, fields: Any, param: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(**{**greedy(model), **fields})
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
    assert param.split("[")[0].split(".")[0] in refused.value.message


@pytest.mark.parametrize("fields", UNSUPPORTED_IN_CHAT, ids=str)
def test_chat_refuses_fields_that_it_does_not_serve(client: OpenAI, model: str, fields: Any) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(**greedy(model, **fields))
    assert refused.value.code == "unsupported_parameter"
    assert refused.value.param == next(iter(fields.get("extra_body", fields)))


def test_a_refused_stream_is_no_stream(client: OpenAI, model: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(stream=True, **greedy(model, logit_bias={"99999999": 1}))
    assert refused.value.param == "logit_bias"


@pytest.mark.parametrize(("fields", "param"), _named(RESPONSES))
def test_responses_name_the_field_at_fault(client: OpenAI, model: str, fields: Any, param: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.responses.create(**{"model": model, "input": "x", "max_output_tokens": 4, **fields})
    assert refused.value.param == param


@pytest.mark.parametrize("fields", UNSUPPORTED_IN_RESPONSES, ids=str)
def test_responses_refuse_fields_that_they_do_not_serve(client: OpenAI, model: str, fields: Any) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.responses.create(model=model, input="x", max_output_tokens=4, **fields)
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", next(iter(fields)))


@pytest.mark.parametrize(("fields", "param"), _named(COMPLETIONS))
def test_completions_name_the_field_at_fault(client: OpenAI, model: str, fields: Any, param: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(**{"model": model, "prompt": "x", "max_tokens": 4, **fields})
    assert refused.value.param == param


def test_refusals_leave_the_connection_open_for_the_next_request(up: Any, model: str) -> None:
    """Each on the same connection, at once after the one before."""
    with OpenAI(base_url=up.base_url, api_key="x", max_retries=0) as client:
        for _ in range(20):
            with pytest.raises(BadRequestError):
                client.chat.completions.create(**greedy(model, n=99))
    assert "Traceback" not in (up.log_dir / "proxy.log").read_text()


def test_unknown_models_and_paths_are_not_found(client: OpenAI, model: str) -> None:
    asks = (
        (client.chat.completions.create, {"messages": [USER]}),
        (client.responses.create, {"input": "x"}),
        (client.completions.create, {"prompt": "x"}),
    )
    for create, fields in asks:
        with pytest.raises(NotFoundError) as refused:
            create(model="nobody", **fields)
        assert (refused.value.param, refused.value.code) == ("model", "model_not_found")
        assert model in refused.value.message
    with pytest.raises(NotFoundError):
        client.models.retrieve("nobody")
    with pytest.raises(NotFoundError):
        client.embeddings.create(model=model, input="x")


def test_models_are_listed_and_retrieved(client: OpenAI, model: str) -> None:
    (listed,) = client.models.list()
    assert listed == client.models.retrieve(model)
    assert (listed.id, listed.object) == (model, "model")
