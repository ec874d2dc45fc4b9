"""The torch engine on a GPU: the tokens of the CPU's, as graphs, ahead of time, and one kernel at a time.

Skipped where there is no GPU: `make test-gpu` runs them on a machine that has one.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrelay.core.errors import ConfigError
from kvrelay.core.sampling import SamplingParams
from tests.gpu.engines import SHAPE, Ask, answers, build, check_all_ways

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def prompts() -> list[list[int]]:
    chance = random.Random(3)
    lengths = (1, 5, 16, 17, 40, 130, 255, 256, 300, 700)
    return [[chance.randrange(10, 49000) for _ in range(chance.choice(lengths))] for _ in range(24)]


def greedy() -> list[Ask]:
    return [(prompt, SamplingParams(max_tokens=1 + 7 * index % 90)) for index, prompt in enumerate(prompts())]


def mixed() -> list[Ask]:
    """Of every kind: what the device draws itself, and what it leaves to the reference."""
    return [
        (
            prompt,
            SamplingParams(
                max_tokens=40,
                temperature=(0.0, 0.8, 1.2)[index % 3],
                seed=index,
                top_k=(0, 0, 50)[index // 3 % 3],
                top_p=(1.0, 1.0, 1.0, 0.9)[index % 4],
                repetition_penalty=(1.0, 1.0, 1.0, 1.0, 1.2)[index % 5],
            ),
        )
        for index, prompt in enumerate(prompts())
    ]


@needs_gpu
@pytest.mark.parametrize("asks", [greedy(), mixed()], ids=["greedy", "mixed"])
def test_tokens_are_the_cpus(model: Path, asks: Any) -> None:
    expected = answers(build(model, "cpu"), asks)
    check_all_ways(build(model, "cuda"), asks, expected)


@needs_gpu
def test_tokens_are_the_same_when_sequences_are_interrupted(model: Path) -> None:
    asks = [(prompt[:200], SamplingParams(max_tokens=150, ignore_eos=True)) for prompt in prompts()]
    expected = answers(build(model, "cuda"), asks)
    engine = build(model, "cuda", num_blocks=50)
    assert answers(engine, asks) == expected
    assert engine.load().num_preemptions > 0


@needs_gpu
def test_bfloat16_follows_float32(model: Path) -> None:
    exact = answers(build(model, "cuda"), greedy())
    rough = answers(build(model, "cuda", dtype="bfloat16"), greedy())
    assert sum(mine[0] == theirs[0] for mine, theirs in zip(rough, exact, strict=True)) >= 20


@needs_gpu
def test_a_device_that_is_not_there_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="CUDA devices"):
        build(model, "cuda:99")


def test_without_a_gpu_cuda_is_refused_by_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="'cuda'"):
        build(model, "cuda")


def test_random_weights_need_a_configuration_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": 1}))
    engine = build(tmp_path, "cpu", random_weights=True)
    other = build(tmp_path, "cpu", random_weights=True)
    asks = [([5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True))]
    assert answers(engine, asks) == answers(other, asks)
