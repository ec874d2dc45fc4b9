"""The streamed text is the whole text, whatever the cuts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrelay.client.detokenizer import WindowDetokenizer

SHARED = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200
)


def split(tokens: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    return [tokens[start:end] for start, end in itertools.pairwise(edges)]


def stream(detokenizer: WindowDetokenizer, chunks: list[list[int]]) -> list[str]:
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.flush()]


def of_tokenizer(tokenizer: Any) -> WindowDetokenizer:
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    byte_ids = {i for token, i in tokenizer.get_vocab().items() if token.startswith("<0x")}
    return WindowDetokenizer(tokenizer.decode, hidden_ids=frozenset(special), byte_ids=frozenset(byte_ids))


@SHARED
@given(tokens=st.lists(st.integers(0, 299), max_size=150), cuts=st.lists(st.integers(0, 150), max_size=40))
def test_any_byte_level_tokens_stream_to_their_whole_decode(
    byte_level_tokenizer: Any, tokens: list[int], cuts: list[int]
) -> None:
    parts = stream(of_tokenizer(byte_level_tokenizer), split(tokens, cuts))
    assert "".join(parts) == byte_level_tokenizer.decode(tokens)


@SHARED
@given(tokens=st.lists(st.integers(0, 266), max_size=150), cuts=st.lists(st.integers(0, 150), max_size=40))
def test_any_byte_fallback_tokens_stream_to_their_whole_decode(
    byte_fallback_tokenizer: Any, tokens: list[int], cuts: list[int]
) -> None:
    parts = stream(of_tokenizer(byte_fallback_tokenizer), split(tokens, cuts))
    assert "".join(parts) == byte_fallback_tokenizer.decode(tokens)


@SHARED
@given(text=st.text(max_size=60))
def test_text_that_was_tokenized_never_shows_a_replacement_character_in_between(
    byte_level_tokenizer: Any, text: str
) -> None:
    tokens = byte_level_tokenizer.encode(text).ids
    parts = stream(of_tokenizer(byte_level_tokenizer), [[token] for token in tokens])
    assert "".join(parts) == byte_level_tokenizer.decode(tokens)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_an_emoji_split_over_tokens_comes_whole_with_its_last_token(byte_level_tokenizer: Any) -> None:
    tokens = byte_level_tokenizer.encode("a🦊b").ids
    assert len(tokens) == 6
    parts = stream(of_tokenizer(byte_level_tokenizer), [[token] for token in tokens])
    assert parts == ["a", "", "", "", "🦊", "b", ""]


def test_a_character_that_stays_incomplete_shows_at_the_end(byte_level_tokenizer: Any) -> None:
    tokens = byte_level_tokenizer.encode("a🦊").ids[:-1]
    parts = stream(of_tokenizer(byte_level_tokenizer), [[token] for token in tokens])
    assert parts == ["a", "", "", "", "\ufffd"]


def test_plain_words_are_not_held_back(byte_fallback_tokenizer: Any) -> None:
    tokens = [byte_fallback_tokenizer.token_to_id(token) for token in ("▁the", "▁fox", "▁", "a")]
    parts = stream(of_tokenizer(byte_fallback_tokenizer), [[token] for token in tokens])
    assert parts == ["the", " fox", " ", "a", ""]


def test_special_tokens_are_not_shown_and_do_not_cut_a_character(byte_level_tokenizer: Any) -> None:
    first, *rest = byte_level_tokenizer.encode("ß").ids
    end = byte_level_tokenizer.token_to_id("<|im_end|>")
    parts = stream(of_tokenizer(byte_level_tokenizer), [[end], [first], [end], rest, [end]])
    assert rest
    assert parts == ["", "", "", "ß", "", ""]


@pytest.mark.parametrize("num_tokens", [100, 1000])
def test_the_cost_of_a_token_does_not_grow_with_the_output(
    byte_level_tokenizer: Any, num_tokens: int
) -> None:
    longest = 0

    def decode(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return str(byte_level_tokenizer.decode(tokens))

    broken = byte_level_tokenizer.encode("🦊").ids[1]
    detokenizer = WindowDetokenizer(decode)
    parts = stream(detokenizer, [[broken]] * num_tokens)
    assert "".join(parts) == "\ufffd" * num_tokens
    assert longest < 40
