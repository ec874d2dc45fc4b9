"""Real tokens against stop strings: text ends, tokens are counted, and special ones are shown or not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrelay.client import ModelTokenizer
from kvrelay.client.output_text import OutputText
from kvrelay.client.stop_strings import StopStrings

SHARED = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200
)


@pytest.fixture(scope="session")
def tokenizer(bundle: bytes) -> ModelTokenizer:
    return ModelTokenizer(bundle)


def make(tokenizer: ModelTokenizer, *stops: str, shows_special: bool = False, **options: Any) -> OutputText:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=not shows_special)
    return OutputText(detokenizer, StopStrings(stops, **options) if stops else None)


def test_a_stop_string_within_many_tokens_ends_text_and_tokens(tokenizer: ModelTokenizer) -> None:
    output, token_ids = make(tokenizer, "日本"), tokenizer.encode("größer 日本 fox")
    text, num_taken = output.push(token_ids)
    assert (text, output.stop_text, output.whole) == ("größer ", "日本", "größer ")
    assert tokenizer.decode(token_ids[:num_taken]) == "größer 日本"
    assert output.flush() == ""


def test_a_stop_string_may_end_within_a_token(tokenizer: ModelTokenizer) -> None:
    token_ids = tokenizer.encode("the lazy")
    assert tokenizer.decode(token_ids[:1]) == "the"
    output = make(tokenizer, "h", include_stop=True)
    assert output.push(token_ids) == ("th", 1)
    assert output.whole == "th"


def test_a_character_that_is_never_finished_can_still_stop_the_text(tokenizer: ModelTokenizer) -> None:
    output = make(tokenizer, "\ufffd")
    assert output.push(tokenizer.encode("a🦊")[:-1]) == ("a", 4)
    assert output.stop_text is None
    assert output.flush() == ""
    assert (output.stop_text, output.whole) == ("\ufffd", "a")


def test_what_was_held_back_comes_at_the_end(tokenizer: ModelTokenizer) -> None:
    output = make(tokenizer, "dogma")
    assert output.push(tokenizer.encode("a dog"))[0] == "a "
    assert (output.flush(), output.stop_text, output.whole) == ("dog", None, "a dog")


def test_special_tokens_count_for_min_tokens_though_they_are_not_shown(tokenizer: ModelTokenizer) -> None:
    end, *rest = tokenizer.encode("<|im_end|>aa")
    output = make(tokenizer, "a", min_tokens=2)
    assert output.push([end, *rest]) == ("a", 3)
    assert output.stop_text == "a"


def test_a_shown_special_token_is_text_and_can_stop(tokenizer: ModelTokenizer) -> None:
    token_ids = tokenizer.encode("a<|im_end|>b")
    assert make(tokenizer, "<|im_end|>", shows_special=True).push(token_ids) == ("a", 2)
    assert make(tokenizer, "<|im_end|>").push(token_ids) == ("ab", 3)


def test_no_detokenizer_gives_no_text_and_takes_every_token() -> None:
    output = OutputText(None)
    assert (output.push([1, 2, 3]), output.flush(), output.whole) == (("", 3), "", "")


@SHARED
@given(
    token_ids=st.lists(st.integers(0, 299), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=10),
    stops=st.lists(st.sampled_from(["e", " fox", "ß", "日本", "\ufffd\ufffd", "the"]), max_size=3),
    min_tokens=st.integers(0, 8),
)
def test_messages_of_any_size_give_the_same_text_and_tokens(
    tokenizer: ModelTokenizer, token_ids: list[int], cuts: list[int], stops: list[str], min_tokens: int
) -> None:
    edges = [0, *sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]

    def run(messages: list[list[int]]) -> tuple[str, int, str | None]:
        output, num_taken = make(tokenizer, *stops, min_tokens=min_tokens) if stops else make(tokenizer), 0
        for message in messages:
            num_taken += output.push(message)[1]
            if output.stop_text is not None:
                break
        output.flush()
        return output.whole, num_taken, output.stop_text

    assert run([token_ids[start:end] for start, end in itertools.pairwise(edges)]) == run([token_ids])
