"""Stop strings: an answer ends before the first of them, wherever token borders fall, and none leaks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .conftest import Ask

NUM_TOKENS = 14


@pytest.fixture(scope="module")
def tokens(ask: Ask) -> list[str]:
    """The tokens of a greedy answer without stop strings."""
    logprobs = ask(logprobs=True, max_tokens=NUM_TOKENS).choices[0].logprobs
    return [entry.token for entry in logprobs.content]


def _stops_across_borders(tokens: list[str]) -> Iterator[str]:
    """Texts that begin in one token and end in another."""
    for size in (2, 3, 4):
        for begin in range(2, len(tokens) - size):
            middle = "".join(tokens[begin : begin + size])
            if len(tokens[begin]) > 1 and len(tokens[begin + size - 1]) > 1:
                yield middle[1:-1]
                break


def _assert_ends_before(stops: list[str], ask: Ask, ask_streamed: Ask, text: str) -> None:
    end = min(text.index(stop) for stop in stops if stop in text)
    whole, streamed = ask(stop=stops, max_tokens=NUM_TOKENS), ask_streamed(stop=stops, max_tokens=NUM_TOKENS)
    assert whole.choices[0].message.content == streamed.text() == text[:end]
    assert whole.choices[0].finish_reason == streamed.finish_reasons[0] == "stop"
    assert not any(stop in streamed.text() for stop in stops)
    assert whole.usage.completion_tokens < NUM_TOKENS


def test_stop_strings_across_token_borders_end_the_answer(
    tokens: list[str], ask: Ask, ask_streamed: Ask
) -> None:
    stops = list(_stops_across_borders(tokens))
    assert len(stops) == 3
    for stop in stops:
        _assert_ends_before([stop], ask, ask_streamed, "".join(tokens))


def test_the_earliest_of_several_stop_strings_ends_the_answer(
    tokens: list[str], ask: Ask, ask_streamed: Ask
) -> None:
    text = "".join(tokens)
    _assert_ends_before([text[-8:-4], "never said", text[20:24], text[40:45]], ask, ask_streamed, text)


def test_what_only_looked_like_a_stop_string_is_given_in_the_end(
    tokens: list[str], ask: Ask, ask_streamed: Ask
) -> None:
    text = "".join(tokens)
    for stop in (f"{text[-6:]}?!", f"{text[10:16]}?!"):
        streamed = ask_streamed(stop=stop, max_tokens=NUM_TOKENS)
        assert streamed.text() == ask(stop=stop, max_tokens=NUM_TOKENS).choices[0].message.content == text
        assert streamed.finish_reasons == {0: "length"}


def test_a_stop_string_can_be_included(tokens: list[str], ask: Ask, ask_streamed: Ask) -> None:
    text = "".join(tokens)
    stop = text[20:25]
    fields = {"stop": stop, "max_tokens": NUM_TOKENS, "extra_body": {"include_stop_str_in_output": True}}
    expected = text[: text.index(stop) + 5]
    assert ask(**fields).choices[0].message.content == ask_streamed(**fields).text() == expected


def test_a_stop_token_ends_the_answer_and_is_not_shown(
    tokens: list[str], ask: Ask, ask_streamed: Ask, token_id_of: Ask
) -> None:
    token = next(token for token in tokens[4:] if token.strip())
    fields = {"max_tokens": NUM_TOKENS, "extra_body": {"stop_token_ids": [int(token_id_of(token))]}}
    before = "".join(tokens[: tokens.index(token)])
    assert ask(**fields).choices[0].message.content == ask_streamed(**fields).text() == before
    assert ask_streamed(**fields).finish_reasons == {0: "stop"}
