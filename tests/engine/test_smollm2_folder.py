"""The real model's folder, against ids published elsewhere for SmolLM2 (its chat prompt and answer)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvrelay.engine.embedded_model import ensure_smollm2

pytestmark = pytest.mark.model

SYSTEM_PROMPT_IDS = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018]
SYSTEM_PROMPT_IDS += [411, 407, 19712, 8182, 2, 198]
CAPITAL_QUESTION_IDS = [1780, 314, 260, 3575, 282, 4649, 47]
CAPITAL_ANSWER_IDS = [504, 3575, 282, 4649, 314, 7042, 30, 2]
FRENCH_QUESTION_IDS = [65, 2726, 290, 1264, 2618, 47765, 1121, 367, 2618, 4649, 9148, 428, 2756, 96, 19870]
FRENCH_QUESTION_IDS += [430, 16520, 8715, 30]


@pytest.fixture(scope="module")
def folder() -> Path:
    return ensure_smollm2()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("question", "question_ids"),
    [
        ("What is the capital of France?", CAPITAL_QUESTION_IDS),
        ("Quelle est la capitale de la France ? Réponds en une phrase.", FRENCH_QUESTION_IDS),
    ],
)
def test_the_chat_prompt_has_the_published_ids(
    question: str, question_ids: list[int], tokenizer: Any
) -> None:
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = [*SYSTEM_PROMPT_IDS, 1, 4093, 198, *question_ids, 2, 198, 1, 520, 9531, 198]
    assert tokenizer.encode(prompt) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world! It's 12345.67 € — naïve café",
        "Привет, мир! Καλημέρα",
        "你好，世界。日本語 한국어",
        "مرحبا بالعالم שלום",
        "हिन्दी ไทย ქართული አማርኛ",
        "🙂👩‍👩‍👧‍👦🇫🇷 ❤️ 𝔘𝔫𝔦",
        "  tabs\t\n\n\r\n   x  ",
        "def f(x):\n    return x**2  # 0x1F",
    ],
)
def test_text_survives_encoding_and_decoding(text: str, tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_greedy_answer_is_right(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = [*SYSTEM_PROMPT_IDS, 1, 4093, 198, *CAPITAL_QUESTION_IDS, 2, 198, 1, 520, 9531, 198]
    with torch.inference_mode():
        output = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    assert output[0, len(prompt) :].tolist() == CAPITAL_ANSWER_IDS
    assert model.dtype == torch.float32
