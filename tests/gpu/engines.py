"""A small Llama, and engines that run it, on one device or another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.cuda.prefill_step import PrefillStep
from kvrelay.engine.interface import SequenceKey
from kvrelay.engine.torch_engine import TorchEngine

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


Ask = tuple[list[int], SamplingParams]


def save_small_llama(folder: Path) -> Path:
    """SmolLM2's shape with six layers, random weights that make outputs vary."""
    from safetensors.torch import save_file

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


def build(model: Path, device: str, **changes: Any) -> TorchEngine:
    settings = {"dtype": "float32", **SMALL, **changes}
    return TorchEngine(EngineConfig(str(model), device=device, **settings))


def answers(engine: TorchEngine, asks: list[Ask]) -> list[list[int]]:
    """All asked at once."""
    return answers_to(
        engine, [TokenRequest(tuple(prompt), len(prompt), sampling) for prompt, sampling in asks]
    )


def answers_to(
    engine: TorchEngine, requests: list[TokenRequest], *, together: int | None = None
) -> list[list[int]]:
    """So many asked at once, None: all."""
    found: list[list[int]] = [[] for _ in requests]
    together = together or len(requests)
    for start in range(0, len(requests), together):
        for index in range(start, min(start + together, len(requests))):
            engine.submit(requests[index], SequenceKey(str(index)))
        while engine.has_work():
            step = engine.step()
            assert not step.failures
            for output in step.outputs:
                found[int(output.key)].append(output.token_id)
    engine.check()
    assert engine.load().num_held_blocks == 0
    return found


def check_all_ways(engine: TorchEngine, asks: list[Ask], expected: list[list[int]]) -> None:
    """Steps ahead (prefills where it pays, then wherever they can be), graphs alone, and one kernel after the
    other give these tokens."""
    assert answers(engine, asks) == expected
    with patch.object(PrefillStep, "has_time", return_value=True):
        assert answers(engine, asks) == expected
    engine._ahead_executor = None
    assert answers(engine, asks) == expected, "graphs that wait for each step's tokens"
    engine._executor._fits_graph = lambda chunks: False  # type: ignore[attr-defined]
    assert answers(engine, asks) == expected, "no graphs at all"
