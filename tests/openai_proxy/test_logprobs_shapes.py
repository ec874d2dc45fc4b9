"""Logprobs in both of OpenAI's shapes, with exact bytes where a token is no whole character."""

from __future__ import annotations

import json
import zlib

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvrelay.client import ModelTokenizer, TokenLogprobs
from kvrelay.openai_proxy.logprobs import CompletionLogprobs, chat_logprobs, num_logprobs_of


@pytest.fixture(scope="session")
def tokenizer() -> ModelTokenizer:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return ModelTokenizer(zlib.compress(json.dumps({"tokenizer": json.loads(made.to_str())}).encode()))


def entry(chosen: float, *top: tuple[int, float]) -> TokenLogprobs:
    return TokenLogprobs(chosen, top)


@pytest.mark.parametrize(
    ("wanted", "num_top", "found"), [(False, None, None), (True, None, 0), (True, 0, 0), (True, 5, 5)]
)
def test_chats_two_fields_are_one_number(wanted: bool, num_top: int | None, found: int | None) -> None:
    assert num_logprobs_of(wanted, num_top) == found


def test_chat_has_one_entry_per_token_with_its_bytes(tokenizer: ModelTokenizer) -> None:
    a, first, second = tokenizer.encode("aé")
    found = chat_logprobs(
        [a, first, second], [entry(-1.0, (a, -1.0), (first, -2.0)), entry(-0.5), None], tokenizer, ()
    )
    assert found == [
        {
            "token": "a",
            "logprob": -1.0,
            "bytes": [97],
            "top_logprobs": [
                {"token": "a", "logprob": -1.0, "bytes": [97]},
                {"token": "\ufffd", "logprob": -2.0, "bytes": [0xC3]},
            ],
        },
        {"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3], "top_logprobs": []},
    ]


def test_what_ends_an_answer_has_no_entry(tokenizer: ModelTokenizer) -> None:
    a, end = tokenizer.encode("a!")
    entries = [entry(-1.0), entry(-2.0)]
    assert [one["token"] for one in chat_logprobs([a, end], entries, tokenizer, {end})] == ["a"]
    assert CompletionLogprobs(tokenizer, {end}, 0).columns([a, end], entries)["tokens"] == ["a"]


def test_completions_have_columns_whose_offsets_go_on_from_part_to_part(tokenizer: ModelTokenizer) -> None:
    a, b, first = tokenizer.encode("ab")[0], tokenizer.encode("b")[0], tokenizer.encode("é")[0]
    columns = CompletionLogprobs(tokenizer, (), 1)
    assert columns.columns([a], [entry(-1.0, (b, -0.5))]) == {
        "tokens": ["a"],
        "token_logprobs": [-1.0],
        "top_logprobs": [{"b": -0.5}],
        "text_offset": [0],
    }
    more = columns.columns([b, first], [entry(-2.0), entry(-3.0)])
    assert (more["tokens"], more["text_offset"]) == (["b", "bytes:\\xc3"], [1, 2])


def test_no_top_asked_for_is_null_per_token(tokenizer: ModelTokenizer) -> None:
    found = CompletionLogprobs(tokenizer, (), 0).columns(tokenizer.encode("ab"), [entry(-1.0), entry(-2.0)])
    assert found["top_logprobs"] == [None, None]
