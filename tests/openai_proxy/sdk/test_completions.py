"""Text completions: prompts as text, token ids or lists of either, and echo."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI

PROMPTS = ["Rivers of Europe are", "The highest mountain is"]
Complete = Any


@pytest.fixture(scope="module")
def complete(client: OpenAI, model: str) -> Complete:
    """Ask for greedy completions; gives the choices' texts."""

    def complete(prompt: Any, **fields: Any) -> list[str]:
        fields = {"max_tokens": 5, "temperature": 0, **fields}
        answer = client.completions.create(model=model, prompt=prompt, **fields)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    return complete


def test_a_list_of_prompts_is_answered_in_its_order(complete: Complete) -> None:
    alone = [complete(prompt)[0] for prompt in PROMPTS]
    assert complete(PROMPTS) == alone
    assert complete(PROMPTS, n=2) == [alone[0], alone[0], alone[1], alone[1]]


def test_token_ids_are_the_text_that_they_stand_for(complete: Complete, hf_tokenizer: Any) -> None:
    ids = [hf_tokenizer.encode(prompt, add_special_tokens=False) for prompt in PROMPTS]
    assert complete(ids[0]) == complete(PROMPTS[0])
    assert complete(ids) == complete(PROMPTS)


def test_echo_puts_the_prompt_first(complete: Complete, hf_tokenizer: Any) -> None:
    alone = [complete(prompt)[0] for prompt in PROMPTS]
    expected = [prompt + text for prompt, text in zip(PROMPTS, alone, strict=True)]
    assert complete(PROMPTS, echo=True) == expected
    assert complete(hf_tokenizer.encode(PROMPTS[0]), echo=True) == expected[:1]


def test_a_stream_of_several_prompts_adds_up(client: OpenAI, model: str, complete: Complete) -> None:
    texts: dict[int, str] = {}
    usages = []
    with client.completions.create(
        model=model,
        prompt=PROMPTS,
        n=2,
        echo=True,
        max_tokens=5,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        for part in stream:
            usages += [part.usage] if part.usage else []
            for choice in part.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert [texts[index] for index in range(4)] == complete(PROMPTS, n=2, echo=True)
    (usage,) = usages
    assert usage.completion_tokens == 20
    assert usage.total_tokens == usage.prompt_tokens + 20


def test_a_stop_string_ends_a_completion(complete: Complete) -> None:
    (text,) = complete(PROMPTS[0], max_tokens=12)
    stop = text[12:16]
    assert complete(PROMPTS[0], max_tokens=12, stop=stop) == [text[: text.index(stop)]]
