"""Logprobs in both of OpenAI's shapes; the bytes of the tokens are the bytes of the text."""

from __future__ import annotations

import math
from typing import Any

import pytest
from openai import OpenAI

from .conftest import Ask

GREEDY = {"logprobs": True, "top_logprobs": 3}
SAMPLED = {**GREEDY, "temperature": 1.5, "seed": 5}
"""Odd tokens, parts of characters among them."""


def _text_of(entries: list[Any]) -> str:
    return b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")


@pytest.mark.parametrize("fields", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_chat_logprobs_have_the_bytes_of_the_text(ask: Ask, ask_streamed: Ask, fields: Any) -> None:
    choice = ask("Écris: 東京 ☂", **fields).choices[0]
    entries = choice.logprobs.content
    assert _text_of(entries) == choice.message.content
    assert len(entries) == 12
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert sorted((top.logprob for top in entry.top_logprobs), reverse=True) == [
            top.logprob for top in entry.top_logprobs
        ]
        assert entry.token == bytes(entry.bytes).decode(errors="replace")
        if fields is not SAMPLED:
            assert entry.top_logprobs[0].bytes == entry.bytes
    streamed = [
        entry
        for chunk in ask_streamed("Écris: 東京 ☂", **fields).chunks
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in entries]
    for mine, theirs in zip(streamed, entries, strict=True):
        assert math.isclose(mine.logprob, theirs.logprob, rel_tol=1e-3, abs_tol=1e-3)


def test_logprobs_without_alternatives_are_the_chosen_tokens_alone(ask: Ask) -> None:
    entries = ask(logprobs=True, max_tokens=3).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in entries] == [[], [], []]
    assert ask(max_tokens=1).choices[0].logprobs is None


def test_completion_logprobs_are_columns_over_the_text(client: OpenAI, model: str) -> None:
    def parts(stream: bool) -> list[Any]:
        fields = {"model": model, "prompt": "Rivers of Europe are", "max_tokens": 10, "temperature": 0}
        answer = client.completions.create(**fields, logprobs=2, stream=stream)
        return [part.choices[0] for part in (list(answer) if stream else [answer])]

    (whole,), streamed = parts(False), parts(True)
    columns = whole.logprobs
    assert "".join(columns.tokens) == whole.text == "".join(part.text for part in streamed)
    for column in (columns.token_logprobs, columns.top_logprobs, columns.text_offset):
        assert len(column) == len(columns.tokens)
    for token, offset in zip(columns.tokens, columns.text_offset, strict=True):
        assert whole.text[offset : offset + len(token)] == token
    for token, top in zip(columns.tokens, columns.top_logprobs, strict=True):
        assert len(top) == 2
        assert max(top, key=lambda text: top[text]) == token
    joined = [token for part in streamed if part.logprobs for token in part.logprobs.tokens]
    offsets = [offset for part in streamed if part.logprobs for offset in part.logprobs.text_offset]
    assert (joined, offsets) == (columns.tokens, columns.text_offset)
