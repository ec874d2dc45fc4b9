"""The real SmolLM2 equals transformers: 36 prompts, 1 to 2,000 tokens, alone and 8 at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from kvrelay.engine import device
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.embedded_model import ensure_smollm2
from kvrelay.engine.torch_engine import TorchEngine

pytestmark = pytest.mark.model

NUM_TOKENS = 16
SYSTEM = "You are a careful assistant. Answer in one short sentence, and say so when you do not know. "
QUESTIONS = [
    "What is the capital of France?",
    "Name three rivers in Africa.",
    "Why is the sky blue?",
    "Write a haiku about autumn.",
    "Translate 'good morning' into Spanish, Italian and German.",
    "def fibonacci(n):",
    "SELECT name, count(*) FROM",
    "1, 1, 2, 3, 5, 8, 13,",
    "Die Hauptstadt von Deutschland ist",
    "東京は",
    "🙂🙃",
    "Once upon a time, in a village by the sea,",
]
PASSAGE = (
    "The history of the lighthouse is longer than that of the harbour it guards. Keepers wrote down the"
    " weather, the ships that passed, and the oil that was burnt each night; their journals, kept for two"
    " hundred years, are read today by people who study storms, trade, and the patience of those who wait. "
)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return ensure_smollm2()


def prompts_of(path: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    plain = [tokenizer.encode(question).ids for question in QUESTIONS]
    shared = [tokenizer.encode(SYSTEM + question).ids for question in QUESTIONS]
    passage = tokenizer.encode(PASSAGE * 40).ids
    lengths = (1, 2, 3, 15, 16, 17, 64, 127, 255, 500, 1000, 2000)
    cut = [passage[index : index + length] for index, length in enumerate(lengths)]
    return plain + shared + cut


@torch.inference_mode()
def transformers_greedy(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    results = []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=2,
        )
        results.append(ids[0, len(prompt) :].tolist())
    return results


def test_greedy_tokens_equal_transformers(smollm2_path, drive, request_of):
    prompts = prompts_of(smollm2_path)
    assert len(prompts) >= 30
    expected = transformers_greedy(smollm2_path, prompts)
    requests = [request_of(prompt, max_tokens=NUM_TOKENS, ignore_eos=False) for prompt in prompts]
    config = EngineConfig(model=str(smollm2_path), kv_bytes=300 << 20, max_num_seqs=8)
    driver = drive(TorchEngine(config))
    assert [driver.generate(request)[0] for request in requests] == expected, "one at a time"
    hits_before = driver.engine.load().prefix_hit_tokens
    assert hits_before > 0, "the shared system prompt was found again"
    assert driver.generate(*requests) == expected, "8 at once, with prefix hits"
    fresh = drive(TorchEngine(EngineConfig(model=str(smollm2_path), kv_bytes=200 << 20, max_num_seqs=8)))
    assert fresh.generate(*requests[::-3]) == expected[::-3], "8 at once, in another order, cold"


def test_greedy_tokens_are_the_same_without_compiled_kernels(smollm2_path, drive, request_of, monkeypatch):
    requests = [request_of(prompt, max_tokens=NUM_TOKENS) for prompt in prompts_of(smollm2_path)[::3]]
    config = EngineConfig(model=str(smollm2_path), kv_bytes=200 << 20, max_num_seqs=8)
    ours = drive(TorchEngine(config)).generate(*requests)
    monkeypatch.setattr(device, "_openmp", lambda: None)
    assert drive(TorchEngine(config)).generate(*requests) == ours
