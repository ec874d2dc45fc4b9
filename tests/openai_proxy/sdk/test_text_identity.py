"""Text in any script: streamed, in one piece, as kvrelay's own client has it, and as Hugging Face decodes
the same tokens. Tokens are often parts of characters here, and no piece shows a broken one."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI

from kvrelay.client import AsyncClient, SamplingParams

from .conftest import Ask

BROKEN = "\N{REPLACEMENT CHARACTER}"
TEXTS = {
    "latin": "Zażółć œuvre, ıİ e\u0301",
    "cyrillic": "Съешь ещё, Їжак",
    "greek": "Ξεσκεπάζω ᾧ",
    "arabic": "نَصٌّ حكيمٌ ٣٤",
    "hebrew": "דַּג סקרן שט",
    "devanagari": "ऋषियों को क्षत्रिय",
    "chinese": "视野无限广，𠮷",
    "japanese": "いろはにチリヌ東京",
    "korean": "다람쥐 헌 쳇바퀴",
    "thai": "เป็นมนุษย์สุด",
    "emoji": "👩🏽‍🚀 👨‍👩‍👧 🏳️‍🌈🇨🇭",
}
in_each_script = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


def _assert_whole(pieces: list[str], text: str) -> None:
    assert "".join(pieces) == text
    assert sum(piece.count(BROKEN) for piece in pieces) == text.count(BROKEN)


@in_each_script
def test_a_forced_text_comes_as_it_is(ask: Ask, ask_streamed: Ask, text: str) -> None:
    """Whichever way the text is cut into tokens: at this temperature it is cut in odd ways."""
    fields: dict[str, Any] = {
        "extra_body": {"structured_outputs": {"choice": [text]}},
        "temperature": 1.5,
        "seed": 3,
        "max_tokens": 200,
        "logprobs": True,
    }
    choice = ask("Say it.", **fields).choices[0]
    assert choice.message.content == text
    assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content) == text.encode()
    del fields["logprobs"]
    _assert_whole(ask_streamed("Say it.", **fields).pieces[0], text)


@in_each_script
async def test_sampled_text_is_what_hugging_face_decodes(
    ask: Ask, ask_streamed: Ask, kvrelay_client: AsyncClient, hf_tokenizer: Any, text: str
) -> None:
    question = f"Continue: {text}"
    own = await kvrelay_client.complete(
        messages=[{"role": "user", "content": question}],
        sampling=SamplingParams(max_tokens=24, temperature=1.5, seed=9),
    )
    expected = hf_tokenizer.decode(
        own.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert own.text == expected
    fields = {"temperature": 1.5, "seed": 9, "max_tokens": 24}
    assert ask(question, **fields).choices[0].message.content == expected
    _assert_whole(ask_streamed(question, **fields).pieces.get(0, []), expected)


@pytest.mark.parametrize("seed", range(4))
async def test_random_tokens_are_what_hugging_face_decodes(
    client: OpenAI,
    model: str,
    kvrelay_client: AsyncClient,
    hf_tokenizer: Any,
    seed: int,
) -> None:
    """So hot that any token may come, special ones and lone bytes too."""
    own = await kvrelay_client.complete(
        "Noise:",
        sampling=SamplingParams(max_tokens=32, temperature=50.0, seed=seed, ignore_eos=True),
    )
    expected = hf_tokenizer.decode(
        own.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    fields: dict[str, Any] = {
        "model": model,
        "prompt": "Noise:",
        "max_tokens": 32,
        "temperature": 50.0,
        "seed": seed,
        "extra_body": {"ignore_eos": True},
    }
    assert own.text == client.completions.create(**fields).choices[0].text == expected
    with client.completions.create(**fields, stream=True) as stream:
        _assert_whole([part.choices[0].text for part in stream if part.choices], expected)


@in_each_script
def test_an_echoed_prompt_comes_as_it_was_sent(client: OpenAI, model: str, text: str) -> None:
    answer = client.completions.create(model=model, prompt=text, echo=True, max_tokens=1, temperature=0)
    assert answer.choices[0].text.startswith(text)


@in_each_script
def test_stop_strings_in_any_script_end_the_text(ask_streamed: Ask, text: str) -> None:
    stop = text[4:6]
    streamed = ask_streamed(
        "Say it.",
        extra_body={"structured_outputs": {"choice": [text]}},
        temperature=1.5,
        seed=4,
        max_tokens=200,
        stop=stop,
    )
    assert streamed.text() == text[: text.index(stop)]
    assert streamed.finish_reasons == {0: "stop"}
