"""Prefixes that go from one engine's cache into another's on a GPU, while both compute something else.

Skipped where there is no GPU: `make test-gpu` runs them on a machine that has one.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from kvrelay.core.request import Prefix, TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.interface import SequenceKey
from kvrelay.engine.torch_engine import TorchEngine
from tests.gpu.engines import answers_to, build

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BLOCK_BYTES = 6 * 2 * 16 * 192 * 4
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)


def prompt_of(seed: int, num_tokens: int) -> TokenRequest:
    chance = random.Random(seed)
    return TokenRequest(tuple(chance.randrange(10, 49000) for _ in range(num_tokens)), num_tokens, GREEDY)


def begin_something(engine: TorchEngine, number: int) -> None:
    """Have a prompt's first step under way, and perhaps a second one queued."""
    engine.submit(prompt_of(1000 + number, 600), SequenceKey(f"other {number}"))
    engine.step()


def finish(engine: TorchEngine) -> None:
    while engine.has_work():
        assert not engine.step().failures


def pull(source: TorchEngine, target: TorchEngine, request: TokenRequest) -> tuple[int, int]:
    """How many tokens came from `source`, and how many of them `target` had."""
    prefix, key, layers = Prefix(request.token_ids), SequenceKey("pull"), range(6)
    pinned, reserved = source.pin_prefix(prefix, key), target.reserve_prefix(prefix, key)
    num_here, num_tokens = reserved.num_cached_tokens, pinned.num_cached_tokens
    staging = source.kv.allocate_staging(source.kv.layout.token_bytes * (num_tokens - num_here))
    source.kv.gather(pinned.block_table, layers, range(num_here, num_tokens), staging, 0).wait()
    target.kv.scatter(reserved.block_table, layers, range(num_here, num_tokens), staging, 0).wait()
    source.release(key)
    target.keep_prefix(key, num_tokens)
    return num_tokens, num_here


def check_pulls(model: Path, device: str) -> None:
    """The source's pool holds two of ten prompts, its host tier the others; the target's pool is small as
    well, so that blocks are received into where others were evicted from."""
    requests = [prompt_of(seed, 150 + 37 * seed) for seed in range(10)]
    computed = answers_to(build(model, device), requests)
    tiered = {"num_blocks": 90, "max_model_len": 1024, "host_kv_bytes": 600 * BLOCK_BYTES}
    source, target = build(model, device, **tiered), build(model, device, **tiered)
    answers_to(source, requests, together=1)
    num_pulled = 0
    for number, (request, expected) in enumerate(zip(requests, computed, strict=True)):
        begin_something(source, number)
        begin_something(target, number)
        num_tokens, num_here = pull(source, target, request)
        assert num_tokens == len(request.token_ids) // 16 * 16
        assert num_here == 0
        num_pulled += (len(request.token_ids) - 1) // 16 * 16
        finish(source)
        finish(target)
        assert answers_to(target, [request]) == [expected]
    assert source.load().host_hit_tokens == 0, "pins are no hits"
    assert target.load().prefix_hit_tokens == num_pulled
    for engine in (source, target):
        assert engine.load().num_held_blocks == 0


@needs_gpu
def test_a_pulled_prefix_gives_the_answers_of_a_computed_one(model: Path) -> None:
    check_pulls(model, "cuda")
