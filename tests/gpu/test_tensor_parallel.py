"""Several GPUs as one engine: the tokens of one GPU, and of the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kvrelay.core.errors import ConfigError
from kvrelay.engine.torch_engine import TorchEngine
from tests.gpu.engines import SHAPE, Ask, answers, build, check_all_ways
from tests.gpu.fresh_process import call_in_fresh_process
from tests.gpu.test_cuda_engine import greedy, mixed

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

EVEN_SHAPE = {
    **SHAPE,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 49153,  # does not divide: the last rank's part is padded
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(EVEN_SHAPE))
    return tmp_path


@contextmanager
def engine_of(folder: Path, device: str, num_ranks: int, dtype: str = "float32") -> Iterator[TorchEngine]:
    engine = build(folder, device, random_weights=True, tensor_parallel_size=num_ranks, dtype=dtype)
    try:
        yield engine
    finally:
        engine.close()


def check_two_give_the_tokens_of_one(folder: Path, asks: list[Ask], num_engines_before: int = 0) -> None:
    with engine_of(folder, "cuda", 1) as engine:
        expected = answers(engine, asks)
    for _ in range(num_engines_before):
        with engine_of(folder, "cuda", 2):
            pass
    with engine_of(folder, "cuda", 2) as engine:
        check_all_ways(engine, asks, expected)


def check_two_follow_one_in_bfloat16(folder: Path) -> None:
    with engine_of(folder, "cuda", 1, "bfloat16") as engine:
        one = answers(engine, greedy())
    with engine_of(folder, "cuda", 2, "bfloat16") as engine:
        two = answers(engine, greedy())
    assert sum(mine[0] == theirs[0] for mine, theirs in zip(one, two, strict=True)) >= 20


@needs_two
@pytest.mark.parametrize("asks", [greedy(), mixed()], ids=["greedy", "mixed"])
def test_two_gpus_give_the_tokens_of_one(folder: Path, asks: list[Ask]) -> None:
    call_in_fresh_process(check_two_give_the_tokens_of_one, folder, asks)


@needs_two
def test_a_second_engine_of_a_process_gives_them_too(folder: Path) -> None:
    call_in_fresh_process(check_two_give_the_tokens_of_one, folder, greedy(), 1)


@needs_two
def test_two_gpus_in_bfloat16_follow_one(folder: Path) -> None:
    call_in_fresh_process(check_two_follow_one_in_bfloat16, folder)


@needs_two
def test_more_ranks_than_gpus_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="CUDA devices"):
        build(folder, f"cuda:{torch.cuda.device_count() - 1}", random_weights=True, tensor_parallel_size=2)
