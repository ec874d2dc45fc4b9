"""What queueing a prefill costs the CPU on one GPU: of single kernels, and of a whole forward pass.

    python -m benchmarks.launch_cost_gpu [--prompts 128 512 1000 1024 2048 4096] [--layers 32]

`launch`: microseconds a call takes the CPU, Triton's way and by handle, for the kernels of a layer.
`forward`: Llama-3.1-8B's shape with random weights in bfloat16, one prompt, one kernel after the other: the
milliseconds until the last launch has returned, both ways, beside those that the device needs if it never
waits for one. Where the CPU takes longer than the device, the device runs dry.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.engine_gpu import LLAMA_3_1_8B
from kvrelay.core.ids import BlockId
from kvrelay.engine.attention import Span
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.forward_pass import slots_of
from kvrelay.engine.model.transformer import TokenBatch
from kvrelay.engine.torch_rank import TorchRank, open_device, plan_engine

ROWS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER = 16, 32, 8, 128, 4096, 14336
LAUNCHES, REPEATS = 200, 10
BLOCK_SIZE = 16
SLEEP_CYCLES = 200_000_000


def triton_s_way() -> object:
    """A context in which no handle is kept."""
    from kvrelay.engine.cuda import compiled_launch

    return patch.object(compiled_launch, "MAX_HANDLES", 0)


def queueing_us(call: Callable[[], object]) -> float:
    """Of one call, the best of some runs; so few calls that none waits for room in the device's queue."""
    best = float("inf")
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        for _ in range(LAUNCHES):
            call()
        best = min(best, (time.perf_counter() - began_s) / LAUNCHES)
    torch.cuda.synchronize()
    return best * 1e6


def launches() -> dict[str, Callable[[], object]]:
    """A layer's row operations, as the engine calls them: with what they allocate."""
    from kvrelay.engine.cuda.rows import CudaRows

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device="cuda")

    rows, hidden, weight, gate_up = CudaRows(1e-5), zeros(ROWS, HIDDEN), zeros(HIDDEN), zeros(ROWS, 2 * INNER)
    heads = zeros(ROWS, HEADS + 2 * KV_HEADS, HEAD_DIM)[:, : HEADS + KV_HEADS]
    cosines, sines = zeros(ROWS, 1, HEAD_DIM), zeros(ROWS, 1, HEAD_DIM // 2)
    return {
        "norm": lambda: rows.rms_norm(hidden, weight),
        "rotate": lambda: rows.rotate(heads, cosines, sines),
        "gate": lambda: rows.gate(gate_up),
    }


class Prefill:
    """A rank's forward pass over one prompt that begins at its first token."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        plan = plan_engine(
            EngineConfig(
                str(folder),
                dtype="bfloat16",
                device="cuda",
                random_weights=True,
                block_size=BLOCK_SIZE,
                num_blocks=-(-max_tokens // BLOCK_SIZE) + 1,
                max_model_len=max_tokens,
                max_num_batched_tokens=max_tokens,
            )
        )
        self._rank = TorchRank(plan, open_device(plan, 0))
        self._rank.forward_pass.prepare_thread()

    @torch.inference_mode()
    def milliseconds(self, num_tokens: int) -> tuple[float, float]:
        """Of the CPU, until all is queued, and of the device, which begins when it is; the best of some."""
        span = Span(tuple(BlockId(block) for block in range(-(-num_tokens // BLOCK_SIZE))), 0, num_tokens)
        slots = torch.from_numpy(slots_of([span], BLOCK_SIZE))
        batch = TokenBatch(
            torch.randint(10, 100_000, (num_tokens,), device="cuda"),
            torch.arange(num_tokens, device="cuda"),
            torch.tensor([num_tokens - 1], device="cuda"),
        )
        found = [self._once(span, slots, batch) for _ in range(REPEATS)]
        return min(cpu for cpu, _ in found), min(device for _, device in found)

    def _once(self, span: Span, slots: Tensor, batch: TokenBatch) -> tuple[float, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._rank.attention.begin([span], slots)
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        began_s = time.perf_counter()
        self._rank.model.forward(batch, None)
        cpu_s = time.perf_counter() - began_s
        end.record()
        end.synchronize()
        return cpu_s * 1e3, float(begin.elapsed_time(end))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 1000, 1024, 2048, 4096])
    parser.add_argument("--layers", type=int, default=LLAMA_3_1_8B["num_hidden_layers"])
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    with triton_s_way():
        ordinary = {name: queueing_us(call) for name, call in launches().items()}
    by_handle = {name: queueing_us(call) for name, call in launches().items()}
    for name, took_us in ordinary.items():
        print(f"launch {name:9}{took_us:7.1f} us Triton's way, {by_handle[name]:5.1f} by handle", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps({**LLAMA_3_1_8B, "num_hidden_layers": args.layers}))
        prefill = Prefill(folder, max(args.prompts))
    with triton_s_way():
        before_ms = [prefill.milliseconds(num_tokens)[0] for num_tokens in args.prompts]
    for num_tokens, cpu_before_ms in zip(args.prompts, before_ms, strict=True):
        cpu_ms, device_ms = prefill.milliseconds(num_tokens)
        line = (
            f"CPU {cpu_before_ms:6.2f} ms Triton's way, {cpu_ms:6.2f} by handle; device {device_ms:7.2f} ms"
        )
        print(f"forward {num_tokens:>6} tokens: {line}", flush=True)


if __name__ == "__main__":
    main()
