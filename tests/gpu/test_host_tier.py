"""The host tier on a GPU: pinned memory, side streams, graphs, and steps that begin ahead of time.

Skipped where there is no GPU: `make test-gpu` runs them on a machine that has one.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from kvrelay.core.errors import ConfigError
from kvrelay.core.ids import BlockId
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.block_mover import CpuBlockMover
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.cuda.block_mover import CudaBlockMover
from kvrelay.engine.cuda.pinned_memory import PinnedMemory
from kvrelay.engine.cuda.prefill_step import PrefillStep
from kvrelay.engine.host_tier import BlockCopy
from kvrelay.engine.interface import KVReady, SequenceKey
from kvrelay.engine.torch_engine import TorchEngine
from tests.gpu.engines import answers_to

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

HIDDEN, INNER, KV_SIZE, LAYERS, VOCAB = 256, 512, 128, 4, 1000
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
BLOCK_BYTES = LAYERS * 2 * 16 * KV_SIZE * 4
ROOMY = {"num_blocks": 2000, "max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 1024}
TIERED = {**ROOMY, "num_blocks": 70, "host_kv_bytes": 500 * BLOCK_BYTES}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that make outputs vary."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return 0.08 * torch.randn(rows, columns, generator=generator)

    tensors = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        tensors |= {
            at + f"{norm}_layernorm.weight": torch.ones(HIDDEN) for norm in ("input", "post_attention")
        }
        for part, rows in (("q", HIDDEN), ("k", KV_SIZE), ("v", KV_SIZE), ("o", HIDDEN)):
            tensors[at + f"self_attn.{part}_proj.weight"] = matrix(rows, HIDDEN)
        for part, rows, columns in (("gate", INNER, HIDDEN), ("up", INNER, HIDDEN), ("down", HIDDEN, INNER)):
            tensors[at + f"mlp.{part}_proj.weight"] = matrix(rows, columns)
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    save_file(tensors, folder / "model.safetensors")
    return folder


def build(model: Path, device: str, settings: dict[str, int]) -> TorchEngine:
    return TorchEngine(EngineConfig(str(model), device=device, **settings))  # type: ignore[arg-type]


def requests(num: int, max_tokens: int) -> list[TokenRequest]:
    """Of 100 to 700 tokens; each fourth begins as the one before it."""
    chance = random.Random(5)
    found: list[TokenRequest] = []
    for index in range(num):
        prompt = [chance.randrange(10, VOCAB - 10) for _ in range(chance.randrange(100, 700))]
        if index % 4 == 3:
            prompt = [*found[-1].token_ids[:90], *prompt[90:]]
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        found.append(TokenRequest(tuple(prompt), len(prompt), sampling))
    return found


@needs_gpu
def test_blocks_move_as_by_plain_copies_beside_a_busy_stream() -> None:
    """The engine's stream and both copies run late by chance; a step overwrites blocks in between."""
    chance = random.Random(2)
    device_cache = torch.randn(4, 2, 40, 16, 2, 64, device="cuda")
    cache = device_cache.cpu()
    block_bytes = 4 * 2 * 16 * 2 * 64 * 4
    mover = CudaBlockMover(device_cache, 30, load_bytes=3 * block_bytes)
    plain = CpuBlockMover(cache, 30)
    filled: set[int] = set()
    for number in range(300):
        copies = []
        for _ in range(chance.randrange(1, 60)):
            to_host = not filled or chance.random() < 0.5
            slot = chance.randrange(30) if to_host else chance.choice(sorted(filled))
            filled.add(slot)
            copies.append(BlockCopy(BlockId(chance.randrange(40)), slot, to_host))
        torch.cuda._sleep(chance.choice([0, 0, 200_000]))  # type: ignore[no-untyped-call]
        mover.move(copies)
        plain.move(copies)
        block = chance.randrange(40)
        for written in (device_cache, cache):
            written[:, :, block].fill_(number)
        if number % 50 == 49:
            assert torch.equal(device_cache.cpu(), cache)


@needs_gpu
@pytest.mark.parametrize("together", [1, 6])
def test_tokens_are_those_of_a_pool_with_room_for_all(model: Path, together: int) -> None:
    asked = requests(12, max_tokens=24)
    expected = answers_to(build(model, "cpu", ROOMY), asked, together=1)
    for ahead, graphs in ((True, True), (False, True), (False, False)):
        engine = build(model, "cuda", TIERED)
        executor: Any = engine._executor
        if not ahead:
            engine._ahead_executor = None
        if not graphs:
            executor._fits_graph = lambda chunks: False
        for _ in range(3):
            assert answers_to(engine, asked, together=together) == expected, (ahead, graphs)
        load = engine.load()
        assert load.host_hit_tokens > 1000
        assert load.num_used_host_blocks <= load.num_host_blocks == 500


@needs_gpu
def test_interrupted_sequences_come_back_from_the_host(model: Path) -> None:
    asked = [
        TokenRequest(item.token_ids[:100], 100, SamplingParams(max_tokens=200, ignore_eos=True))
        for item in requests(8, 1)
    ]
    expected = answers_to(build(model, "cuda", ROOMY), asked, together=8)
    engine = build(model, "cuda", TIERED)
    assert answers_to(engine, asked, together=8) == expected
    load = engine.load()
    assert load.num_preemptions > 0
    assert load.host_hit_tokens > 0


@needs_gpu
def test_handoffs_between_two_tiered_engines_give_the_same_tokens(model: Path) -> None:
    """Gathered as soon as it is announced, on the store's own stream, and scattered into evicted blocks."""
    asked = requests(8, max_tokens=12)
    expected = answers_to(build(model, "cpu", ROOMY), asked, together=1)
    source, target = build(model, "cuda", TIERED), build(model, "cuda", TIERED)
    staging = source.kv.allocate_staging(1024 * source.kv.layout.token_bytes)
    for turn in range(3):
        for index, request in enumerate(asked):
            key = SequenceKey(f"{turn}-{index}")
            tokens = [_hand_off(source, target, key, request, staging)]
            while target.has_work():
                tokens += [output.token_id for output in target.step().outputs]
            assert tokens == expected[index]
    for engine in (source, target):
        engine.check()
        assert engine.load().num_held_blocks == 0
        assert engine.load().host_hit_tokens > 1000


@needs_gpu
def test_queued_prefills_send_what_came_from_the_host_and_what_they_computed(model: Path) -> None:
    """Prompts that come again are restored while another one is computed."""
    asked = requests(8, max_tokens=12)
    expected = answers_to(build(model, "cpu", ROOMY), asked, together=1)
    source, target = build(model, "cuda", TIERED), build(model, "cuda", {**ROOMY, "num_blocks": 4000})
    room_bytes = 1024 * source.kv.layout.token_bytes
    staging: Any = source.kv.allocate_staging(room_bytes)
    arrived: dict[SequenceKey, list[tuple[KVReady, torch.Tensor]]] = {}

    def gather(ready: KVReady) -> None:
        num_bytes = source.kv.gather(ready.block_table, ready.layers, ready.tokens, staging, 0).wait()
        arrived.setdefault(ready.key, []).append((ready, staging.bytes[:num_bytes].clone()))

    source.set_kv_ready_listener(gather)
    for turn in range(3):
        keys = {SequenceKey(f"{turn}-{index}"): index for index in range(len(asked))}
        for key, index in keys.items():
            source.submit_prefill(asked[index], key)
        with patch.object(PrefillStep, "has_time", return_value=True):
            while source.has_work():
                for output in source.step().outputs:
                    key, tokens = output.key, [output.token_id]
                    source.release(key)
                    _start(target, key, asked[keys[key]], arrived.pop(key), output.token_id)
                    while target.has_work():
                        tokens += [item.token_id for item in target.step().outputs]
                    assert tokens == expected[keys[key]]
                source.check()
    assert source.load().num_held_blocks == 0
    assert source.load().host_hit_tokens > 1000


def _start(
    target: TorchEngine,
    key: SequenceKey,
    request: TokenRequest,
    arrived: list[tuple[KVReady, torch.Tensor]],
    first_token_id: int,
) -> None:
    """As a handoff that found none of the prompt in the target's cache."""
    salted = TokenRequest(request.token_ids, request.num_prompt_tokens, request.sampling, key.encode())
    reservation = target.reserve(salted, key)
    for ready, received in arrived:
        staging: Any = target.kv.allocate_staging(received.numel())
        staging.bytes[: received.numel()].copy_(received)
        torch.cuda.synchronize()
        target.kv.scatter(reservation.block_table, ready.layers, ready.tokens, staging, 0).wait()
    target.start_decode(key, first_token_id)


def _hand_off(
    source: TorchEngine, target: TorchEngine, key: SequenceKey, request: TokenRequest, staging: Any
) -> int:
    """Prefill on `source`, move each range the moment it is announced, start on `target`; the first token."""
    reservation = target.reserve(request, key)

    def move(ready: KVReady) -> None:
        tokens = range(max(ready.tokens.start, reservation.num_cached_tokens), ready.tokens.stop)
        if tokens:
            source.kv.gather(ready.block_table, ready.layers, tokens, staging, 0)
            target.kv.scatter(reservation.block_table, ready.layers, tokens, staging, 0)

    source.set_kv_ready_listener(move)
    source.submit_prefill(request, key)
    first: list[int] = []
    while not first:
        first = [output.token_id for output in source.step().outputs]
    source.release(key)
    target.start_decode(key, first[0])
    return first[0]


def test_more_memory_than_the_host_has_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="the host has"):
        PinnedMemory(1 << 60)
