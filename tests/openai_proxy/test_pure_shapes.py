"""Sampling, errors, usage and events: from OpenAI's words to kvrelay's, and back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvrelay.client import FinishReason, GenerationResult
from kvrelay.core.errors import KVRelayError, NodeUnavailable, Overloaded, UnknownModel
from kvrelay.core.request_report import RequestReport
from kvrelay.core.sampling import MAX_SEED, Grammar, GrammarKind, SamplingParams
from kvrelay.openai_proxy.errors import HTTP_STATUS, ApiError, from_kvrelay
from kvrelay.openai_proxy.sampling import for_choice, grammar_of, sampling_of
from kvrelay.openai_proxy.schema.base import StructuredOutputs
from kvrelay.openai_proxy.schema.chat import ChatBody, ResponseFormat
from kvrelay.openai_proxy.service import usage_of
from kvrelay.openai_proxy.sse import TextEvent, compact_json, event, named_event

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
REPORT = RequestReport("p0", "d0", 1, 7, 3, 2, 0.0, 0.1, 0.2, 4096, 2, 0.01, "memory")


def result(num_prompt: int, num_cached: int, num_output: int) -> GenerationResult:
    report = replace(REPORT, num_prompt_tokens=num_prompt, num_cached_tokens=num_cached)
    ids = tuple(range(num_output))
    return GenerationResult("r", "", ids, FinishReason.STOP, report, (), 0.1, (), 0.2, 0, 0, "a:1")


def sampling(**fields: Any) -> SamplingParams:
    return sampling_of(ChatBody.model_validate(CHAT | fields), max_tokens=50, num_logprobs=None, grammar=None)


# ---- sampling


def test_what_is_left_out_is_openais_default() -> None:
    assert sampling() == SamplingParams(max_tokens=50, temperature=1.0)


def test_every_sampling_field_arrives() -> None:
    found = sampling(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.1, presence_penalty=-1.0,
        frequency_penalty=2, seed=-1, stop_token_ids=[3], ignore_eos=True, min_tokens=4,
        logit_bias={"5": -100, "7": 1.5},
    )  # fmt: skip
    assert found == SamplingParams(
        max_tokens=50, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.1,
        presence_penalty=-1.0, frequency_penalty=2.0, seed=MAX_SEED, stop_token_ids=(3,), ignore_eos=True,
        min_tokens=4, logit_bias=((5, -100.0), (7, 1.5)),
    )  # fmt: skip


def test_minus_one_turns_top_k_off() -> None:
    assert sampling(top_k=-1).top_k == 0


@pytest.mark.parametrize("key", ["x", "-1", "1.0", " 1", "", "٣", "1" * 11])
def test_a_logit_bias_for_what_is_no_token_id_is_refused(key: str) -> None:
    with pytest.raises(ApiError) as caught:
        sampling(logit_bias={key: 1})
    assert (caught.value.param, caught.value.status) == ("logit_bias", 400)


def test_choices_differ_and_the_same_seed_gives_the_same_ones() -> None:
    seeds = [for_choice(sampling(seed=5), index).seed for index in range(16)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 16
    assert seeds == [for_choice(sampling(seed=5), index).seed for index in range(16)]
    assert for_choice(sampling(), 3).seed is None


@pytest.mark.parametrize(
    ("given", "kind", "source"),
    [
        ({"json": {"type": "integer"}}, GrammarKind.JSON_SCHEMA, '{"type":"integer"}'),
        ({"json_object": True}, GrammarKind.JSON_OBJECT, ""),
        ({"regex": "a+"}, GrammarKind.REGEX, "a+"),
        ({"grammar": "start: /a/"}, GrammarKind.LARK, "start: /a/"),
        ({"choice": ["a|b", "c"]}, GrammarKind.REGEX, r"a\|b|c"),
    ],
)
def test_structured_outputs_become_grammars(given: dict[str, Any], kind: GrammarKind, source: str) -> None:
    assert grammar_of(StructuredOutputs.model_validate(given), None) == Grammar(kind, source)


def test_a_response_format_becomes_a_grammar_unless_it_is_text() -> None:
    def of(**given: Any) -> Grammar | None:
        return grammar_of(None, ResponseFormat.model_validate(given))

    assert of(type="text") is None
    assert of(type="json_object") == Grammar(GrammarKind.JSON_OBJECT)
    schema = {"name": "x", "schema": {"type": "object"}}
    assert of(type="json_schema", json_schema=schema) == Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}')


def test_two_grammars_at_once_are_refused() -> None:
    structured = StructuredOutputs.model_validate({"regex": "a"})
    with pytest.raises(ApiError, match="together"):
        grammar_of(structured, ResponseFormat(type="json_object"))
    assert grammar_of(structured, ResponseFormat(type="text")) == Grammar(GrammarKind.REGEX, "a")


# ---- errors


def all_errors() -> list[type[KVRelayError]]:
    """The tree of `core/errors.py`; what other packages derive for themselves never reaches a caller."""
    found, rest = [], [KVRelayError]
    while rest:
        kind = rest.pop()
        found.append(kind)
        rest += [child for child in kind.__subclasses__() if child.__module__ == KVRelayError.__module__]
    return found


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_every_error_has_an_http_status_and_only_faults_of_the_server_are_5xx(
    kind: type[KVRelayError],
) -> None:
    assert kind.code in HTTP_STATUS
    error = from_kvrelay(kind("why"))
    assert error.body()["error"]["message"] == "why"
    assert ("retry-after" in error.headers()) == (error.status in (429, 503))
    if kind.retryable:
        assert error.status in (429, 503), "a client comes back for these"


def test_no_status_is_kept_for_an_error_that_is_gone() -> None:
    assert set(HTTP_STATUS) == {kind.code for kind in all_errors()}


def test_a_retry_time_is_rounded_up_to_whole_seconds() -> None:
    assert from_kvrelay(Overloaded("x", retry_after_s=1.2)).headers() == {"retry-after": "2"}
    assert from_kvrelay(Overloaded("x", retry_after_s=0.0)).headers() == {"retry-after": "1"}
    assert from_kvrelay(NodeUnavailable("x")).headers() == {"retry-after": "1"}


@pytest.mark.parametrize(
    ("field", "param"),
    [
        (None, None),
        ("sampling.temperature", "temperature"),
        ("sampling.num_logprobs", "top_logprobs"),
        ("prompt_token_ids", "prompt"),
        ("request_id", "x-request-id"),
        ("messages[0].content", "messages[0].content"),
    ],
)
def test_fields_are_called_as_the_caller_calls_them(field: str | None, param: str | None) -> None:
    error = from_kvrelay(UnknownModel("x", field=field), {"request_id": "x-request-id"})
    assert (error.param, error.code, error.status) == (param, "model_not_found", 404)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"), (401, "authentication_error"), (404, "invalid_request_error"),
        (429, "rate_limit_error"), (500, "server_error"), (503, "server_error"),
    ],
)  # fmt: skip
def test_an_errors_type_follows_from_its_status(status: int, kind: str) -> None:
    assert ApiError(status, "x").body()["error"]["type"] == kind


# ---- usage


def test_each_prompt_counts_once_and_every_output_token_counts() -> None:
    two_prompts_two_choices = [result(7, 2, 3), result(7, 7, 4), result(9, 0, 1), result(9, 9, 2)]
    usage = usage_of(two_prompts_two_choices, 2)
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (16, 10, 26)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert usage_of([result(7, 2, 3)])["total_tokens"] == 10


# ---- events

ANY_TEXT = st.text(st.characters(), max_size=30)
"""With control characters and lone surrogates."""


@given(text=ANY_TEXT)
@example(text='"\\\n\r\u2028\u0085\x00\x1f\ud800')
def test_a_text_event_is_the_event_that_was_encoded_whole(text: str) -> None:
    shape = {"id": 'a"b', "choices": [{"delta": {"content": TextEvent.MARK}, "n": None}], "z": "é"}
    whole = {"id": 'a"b', "choices": [{"delta": {"content": text}, "n": None}], "z": "é"}
    for name in ("", "response.x"):
        written = TextEvent(shape, name).with_text(text)
        assert written == (named_event(name, whole) if name else event(whole))


@given(text=ANY_TEXT)
def test_an_event_is_one_line_of_json(text: str) -> None:
    written = event({"x": text}).decode()
    assert written.startswith("data: ")
    assert written.endswith("\n\n")
    assert not {"\n", "\r"} & set(written[:-2])
    sent = text.encode(errors="replace").decode()
    assert json.loads(written.removeprefix("data: ")) == {"x": sent}


def test_json_has_no_blanks_and_text_as_it_is() -> None:
    assert compact_json({"a": ["é", 1, None]}) == '{"a":["é",1,null]}'.encode()
