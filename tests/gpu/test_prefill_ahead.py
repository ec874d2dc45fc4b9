"""A prefill step that is queued behind another one on a GPU: tokens, KV and the order of what happens.

Skipped where there is no GPU: `make test-gpu` runs them on a machine that has one.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.cuda.prefill_step import PrefillStep
from kvrelay.engine.interface import KVReady, SequenceKey
from kvrelay.engine.torch_engine import TorchEngine
from tests.gpu.engines import answers_to, build
from tests.gpu.test_against_cpu import FLOAT32_TOLERANCE, read_kv, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BUDGET = 256
"""Tokens of a step, as `SMALL` has it."""
LONG_SLEEP = 4_000_000_000
"""Cycles of the device: some two seconds."""


def request_of(num_tokens: int, variant: int, **sampling: Any) -> TokenRequest:
    ids = tuple(random.Random(variant).choices(range(10, 49_000), k=num_tokens))
    return TokenRequest(ids, num_tokens, SamplingParams(**{"max_tokens": 8, **sampling}))


@pytest.fixture
def engine(model: Path) -> TorchEngine:
    """Warm: what is compiled or allocated at a first use is there."""
    engine = build(model, "cuda", layers_per_group=1)
    requests = {str(index): request_of(BUDGET * (1 + 2 * (index % 2)), 1000 + index) for index in range(6)}
    with patch.object(PrefillStep, "has_time", return_value=True):
        prefill(engine, requests)
    release(engine, requests)
    return engine


class Transfer:
    """Gathers each range the moment it is announced, as the transfer thread may."""

    def __init__(self, engine: TorchEngine, num_tokens: int) -> None:
        self._engine = engine
        self._staging: Any = engine.kv.allocate_staging(num_tokens * engine.kv.layout.token_bytes)
        self._num_bytes = 0
        self.ready: list[tuple[KVReady, int, int]] = []
        engine.set_kv_ready_listener(self)

    def __call__(self, ready: KVReady) -> None:
        kv = self._engine.kv
        num_bytes = len(ready.layers) * len(ready.tokens) * kv.layout.token_bytes_per_layer
        kv.gather(ready.block_table, ready.layers, ready.tokens, self._staging, self._num_bytes)
        self.ready.append((ready, self._num_bytes, self._num_bytes + num_bytes))
        self._num_bytes += num_bytes

    def ranges(self, key: str) -> list[tuple[int, int]]:
        """First token and layer of each, in order."""
        return [(ready.tokens.start, ready.layers.start) for ready, _, _ in self.ready if ready.key == key]

    def gathered(self, key: str, num_tokens: int) -> Tensor:
        """``[num_layers, 2, num_tokens, num_kv_heads, head_dim]``."""
        torch.cuda.synchronize()
        layout = self._engine.kv.layout
        found = torch.full((layout.num_layers, 2, num_tokens, layout.num_kv_heads, layout.head_dim), 77.0)
        for ready, start, stop in self.ready:
            if ready.key == key:
                part = self._staging.bytes[start:stop].cpu().view(torch.float32)
                layers, tokens = ready.layers, ready.tokens
                into = found[layers.start : layers.stop, :, tokens.start : tokens.stop]
                into.copy_(part.view(into.shape))
        return found


def prefill(engine: TorchEngine, requests: dict[str, TokenRequest]) -> dict[str, int]:
    """All at once; their first tokens. Nothing is released."""
    for key, request in requests.items():
        engine.submit_prefill(request, SequenceKey(key))
    drawn: dict[str, int] = {}
    while engine.has_work():
        step = engine.step()
        assert not step.failures
        drawn |= {str(output.key): output.token_id for output in step.outputs}
        engine.check()
    return drawn


def release(engine: TorchEngine, requests: dict[str, TokenRequest]) -> None:
    for key in requests:
        engine.release(SequenceKey(key))
    assert engine.load().num_held_blocks == 0


def log_events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...]]]:
    """Who is launched, and whose results are read, in order; the next step is launched whenever it can be."""
    log: list[tuple[str, tuple[str, ...]]] = []

    def logged(name: str, what: str) -> None:
        plain = getattr(PrefillStep, name)

        def method(step: PrefillStep, *arguments: Any) -> Any:
            log.append((what, tuple(str(chunk.sequence.key) for chunk in step.chunks)))
            return plain(step, *arguments)

        monkeypatch.setattr(PrefillStep, name, method)

    logged("queued", "launched")
    logged("results", "read")
    monkeypatch.setattr(PrefillStep, "has_time", lambda step: True)
    return log


def test_the_next_prompt_is_launched_before_the_token_of_the_one_before_is_read(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = {key: request_of(BUDGET, variant) for variant, key in enumerate("abc")}
    log = log_events(monkeypatch)
    prefill(engine, requests)
    assert log == [
        ("launched", ("a",)),
        ("launched", ("b",)),
        ("read", ("a",)),
        ("launched", ("c",)),
        ("read", ("b",)),
        ("read", ("c",)),
    ]


@pytest.mark.parametrize("lengths", [(BUDGET, BUDGET), (3 * BUDGET,)], ids=["prompts", "chunks"])
def test_launching_waits_for_nothing_on_the_device(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]
) -> None:
    """Two steps are launched while the device sleeps."""
    launched: list[PrefillStep] = []
    queued = PrefillStep.queued

    def queue(step: PrefillStep, read: Any) -> None:
        queued(step, read)
        launched.append(step)

    monkeypatch.setattr(PrefillStep, "queued", queue)
    monkeypatch.setattr(PrefillStep, "has_time", lambda step: True)
    monkeypatch.setattr(PrefillStep, "advance", lambda step: False)
    for variant, length in enumerate(lengths):
        engine.submit_prefill(request_of(length, variant, temperature=0.8, seed=4), SequenceKey(str(variant)))
    torch.cuda._sleep(LONG_SLEEP)  # type: ignore[no-untyped-call]
    assert engine.step().is_partial
    assert [(step.chunks[0].sequence.key, step.chunks[0].start) for step in launched] == (
        [("0", 0), ("1", 0)] if len(lengths) == 2 else [("0", 0), ("0", BUDGET)]
    )
    assert launched[0]._num_reported == 0, "the device has not come to the first layer's end"
    assert not launched[0]._marks[0].query()
    torch.cuda.synchronize()


def test_queued_prompts_give_the_tokens_and_the_kv_of_each_alone(engine: TorchEngine, model: Path) -> None:
    """What was gathered when it was announced is what is there in the end, and the CPU's."""
    lengths = (BUDGET, 1, 255, 40, 700, BUDGET, 17, 600, 300)
    requests = {
        f"k{index}": request_of(length, index, temperature=(0.0, 0.9)[index % 2], seed=index)
        for index, length in enumerate(lengths)
    }
    cpu = build(model, "cpu")
    alone: dict[str, int] = {}
    expected: dict[str, Tensor] = {}
    for key, request in requests.items():
        alone |= prefill(cpu, {key: request})
        expected[key] = read_kv(cpu, SequenceKey(key), len(request.token_ids))
        release(cpu, {key: request})
    transfer = Transfer(engine, sum(lengths))
    with patch.object(PrefillStep, "has_time", return_value=True):
        assert prefill(engine, requests) == alone
    for key, request in requests.items():
        num_tokens = len(request.token_ids)
        ranges = transfer.ranges(key)
        assert ranges == sorted(set(ranges)), "each once, in order of tokens, then of layers"
        gathered = transfer.gathered(key, num_tokens)
        assert torch.equal(gathered, read_kv(engine, SequenceKey(key), num_tokens))
        assert relative_error(gathered, expected[key]) < FLOAT32_TOLERANCE
    release(engine, requests)


def test_a_step_ahead_gives_the_tokens_of_steps_that_wait(engine: TorchEngine, model: Path) -> None:
    """Of one engine that decodes, too; many prompts end with their first token."""
    chance = random.Random(7)
    requests = [
        request_of(chance.randrange(1, 900), 100 + index, max_tokens=chance.choice([1, 1, 1, 9]))
        for index in range(40)
    ]
    waits = build(model, "cuda")
    waits._ahead_executor = None
    with patch.object(PrefillStep, "has_time", return_value=True):
        assert answers_to(engine, requests, together=10) == answers_to(waits, requests, together=10)
