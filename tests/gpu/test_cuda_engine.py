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
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.interface import SequenceKey
from kvrelay.engine.torch_engine import TorchEngine

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
SMALL = {"num_blocks": 900, "max_num_seqs": 16, "max_num_batched_tokens": 256, "max_model_len": 2048}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's shape with six layers, random weights that make outputs vary."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    generator = torch.Generator().manual_seed(1)
    hidden, inner, kv_size = 576, 1536, 192

    def norm(size: int) -> torch.Tensor:
        return 1 + 0.1 * torch.randn(size, generator=generator)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return 0.05 * torch.randn(rows, columns, generator=generator)

    tensors = {"model.embed_tokens.weight": matrix(49152, hidden), "model.norm.weight": norm(hidden)}
    for layer in range(6):
        at = f"model.layers.{layer}."
        tensors |= {
            at + "input_layernorm.weight": norm(hidden),
            at + "post_attention_layernorm.weight": norm(hidden),
            at + "self_attn.q_proj.weight": matrix(hidden, hidden),
            at + "self_attn.k_proj.weight": matrix(kv_size, hidden),
            at + "self_attn.v_proj.weight": matrix(kv_size, hidden),
            at + "self_attn.o_proj.weight": matrix(hidden, hidden),
            at + "mlp.gate_proj.weight": matrix(inner, hidden),
            at + "mlp.up_proj.weight": matrix(inner, hidden),
            at + "mlp.down_proj.weight": matrix(hidden, inner),
        }
    save_file(tensors, folder / "model.safetensors")
    return folder


def prompts() -> list[list[int]]:
    chance = random.Random(3)
    lengths = (1, 5, 16, 17, 40, 130, 255, 256, 300, 700)
    return [[chance.randrange(10, 49000) for _ in range(chance.choice(lengths))] for _ in range(24)]


def greedy() -> list[tuple[list[int], SamplingParams]]:
    return [(prompt, SamplingParams(max_tokens=1 + 7 * index % 90)) for index, prompt in enumerate(prompts())]


def mixed() -> list[tuple[list[int], SamplingParams]]:
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


def build(model: Path, device: str, **changes: Any) -> TorchEngine:
    settings = {"dtype": "float32", **SMALL, **changes}
    return TorchEngine(EngineConfig(str(model), device=device, **settings))


def answers(engine: TorchEngine, asks: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in asks]
    for index, (prompt, sampling) in enumerate(asks):
        request = TokenRequest(tuple(prompt), len(prompt), sampling)
        engine.submit(request, SequenceKey(str(index)))
    while engine.has_work():
        step = engine.step()
        assert not step.failures
        for output in step.outputs:
            found[int(output.key)].append(output.token_id)
    engine.check()
    assert engine.load().num_held_blocks == 0
    return found


@needs_gpu
@pytest.mark.parametrize("asks", [greedy(), mixed()], ids=["greedy", "mixed"])
def test_tokens_are_the_cpus(model: Path, asks: Any) -> None:
    expected = answers(build(model, "cpu"), asks)
    engine = build(model, "cuda")
    assert answers(engine, asks) == expected
    engine._ahead_executor = None
    assert answers(engine, asks) == expected, "graphs that wait for each step's tokens"
    engine._executor._fits_graph = lambda chunks: False  # type: ignore[attr-defined]
    assert answers(engine, asks) == expected, "no graphs at all"


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
