"""What the prefix cache's host tier gives and costs on one GPU.

    python -m benchmarks.host_tier_gpu [--json] [--prompts 4096 8192 15000] [--repeats 5] [--device cpu]

Two engines of Llama-3.1-8B's shape with random weights in bfloat16, alike but for `host_kv_bytes`, each with
a KV pool that is full of other prompts and holds little more than one. Milliseconds from the request to its
first token, the median of the repeats:

* `computed`: the prompt is new; without a host tier.
* `evicting`: the same with the tier, so that every block that the prompt takes is first copied to the host;
  `slowdown` is its ratio to `computed`. The two engines take turns.
* `device hit`: the prompt has just been here.
* `host hit`: it has been evicted since, and comes back from the host, while what it displaces goes there.

Beside it what copies between the pool and the host give alone, in GB/s (10^9 bytes), one direction at a time.
`--device cpu` tries the script itself with a small shape.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.engine_gpu import LLAMA_3_1_8B
from kvrelay.core.ids import BlockId
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.block_mover import BlockMover, CpuBlockMover
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.device import TORCH_DTYPES
from kvrelay.engine.factory import load_engine
from kvrelay.engine.host_tier import BlockCopy
from kvrelay.engine.interface import SequenceKey

BLOCK_SIZE = 16
SPARE_BLOCKS = 32
SMALL_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
}


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure. The host tier holds what fills `num_host_pools` KV pools."""

    device: str
    prompts: list[int]
    repeats: int
    num_host_pools: int = 8

    @property
    def dtype(self) -> str:
        return "float32" if self.device == "cpu" else "bfloat16"

    @property
    def shape(self) -> dict[str, object]:
        return {**LLAMA_3_1_8B, **(SMALL_SHAPE if self.device == "cpu" else {})}

    @property
    def num_blocks(self) -> int:
        return -(-max(self.prompts) // BLOCK_SIZE) + SPARE_BLOCKS

    @property
    def cache_shape(self) -> tuple[int, ...]:
        layers, heads, head_dim = (
            int(str(self.shape[name])) for name in ("num_hidden_layers", "num_key_value_heads", "head_dim")
        )
        return (layers, 2, self.num_blocks, BLOCK_SIZE, heads, head_dim)

    @property
    def block_bytes(self) -> int:
        layers, _, _, block_size, heads, head_dim = self.cache_shape
        return layers * 2 * block_size * heads * head_dim * TORCH_DTYPES[self.dtype].itemsize


class BenchedEngine:
    """Stepped by this thread, one request at a time."""

    def __init__(self, folder: Path, options: Options, *, host_kv_bytes: int) -> None:
        self._options = options
        self._number = 0
        self._engine = load_engine(
            EngineConfig(
                str(folder),
                dtype=options.dtype,
                device=options.device,
                random_weights=True,
                num_blocks=options.num_blocks,
                host_kv_bytes=host_kv_bytes,
                max_num_seqs=4,
                max_num_batched_tokens=max(options.prompts),
            )
        )

    def ttft_ms(self, prompt: list[int]) -> float:
        self._number += 1
        sampling = SamplingParams(max_tokens=1, ignore_eos=True)
        began_s = time.perf_counter()
        self._engine.submit(
            TokenRequest(tuple(prompt), len(prompt), sampling), SequenceKey(str(self._number))
        )
        num_outputs = 0
        while not num_outputs:
            output = self._engine.step()
            if output.failures:
                sys.exit(f"the engine failed: {output.failures[0]}")
            num_outputs = len(output.outputs)
        return (time.perf_counter() - began_s) * 1e3

    def hit_ms(self, prompt: list[int], *, from_host: bool) -> float:
        """As `ttft_ms`, of a prompt whose whole blocks must all be found there and nowhere else."""
        before = self._engine.load()
        ms = self.ttft_ms(prompt)
        after = self._engine.load()
        whole = (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
        hit = after.prefix_hit_tokens - before.prefix_hit_tokens
        host_hit = after.host_hit_tokens - before.host_hit_tokens
        if (hit, host_hit) != (whole, whole if from_host else 0):
            sys.exit(f"{hit} of {whole} tokens were found, {host_hit} of them in the host tier")
        return ms

    def fill(self) -> None:
        """Take the whole pool with prompts that never come again."""
        longest = max(self._options.prompts)
        for _ in range(self._options.num_blocks // (longest // BLOCK_SIZE) + 1):
            self.ttft_ms(new_prompt(self._options, longest))


def new_prompt(options: Options, num_tokens: int) -> list[int]:
    last = int(str(options.shape["vocab_size"])) - 300
    return [random.randint(10, last) for _ in range(num_tokens)]


def measure(tiered: BenchedEngine, plain: BenchedEngine, options: Options) -> dict[str, dict[str, float]]:
    """Milliseconds by length of prompt and kind."""
    tiered.fill()
    plain.fill()
    found: dict[str, dict[str, float]] = {}
    for num_tokens in options.prompts:
        times: dict[str, list[float]] = {}
        for _ in range(options.repeats):
            prompt = new_prompt(options, num_tokens)
            times.setdefault("computed", []).append(plain.ttft_ms(new_prompt(options, num_tokens)))
            times.setdefault("evicting", []).append(tiered.ttft_ms(prompt))
            times.setdefault("device hit", []).append(tiered.hit_ms(prompt, from_host=False))
            tiered.fill()
            times.setdefault("host hit", []).append(tiered.hit_ms(prompt, from_host=True))
        medians = {kind: statistics.median(values) for kind, values in times.items()}
        found[str(num_tokens)] = {**medians, "slowdown": medians["evicting"] / medians["computed"]}
    return found


def copy_gb_per_s(options: Options) -> dict[str, float]:
    """Of a whole pool, host memory in one piece; the best of the repeats."""
    cache = torch.zeros(options.cache_shape, dtype=TORCH_DTYPES[options.dtype], device=options.device)
    mover = _mover(cache, options.num_blocks)
    found = {"to_host": 0.0, "to_device": 0.0}
    for _ in range(options.repeats + 1):
        for direction in found:
            copies = [
                BlockCopy(BlockId(index), index, direction == "to_host")
                for index in range(options.num_blocks)
            ]
            _synchronize(cache)
            began_s = time.perf_counter()
            mover.move(copies)
            _synchronize(cache)
            seconds = time.perf_counter() - began_s
            found[direction] = max(found[direction], options.num_blocks * options.block_bytes / seconds / 1e9)
    return found


def _mover(cache: torch.Tensor, num_slots: int) -> BlockMover:
    if not cache.is_cuda:
        return CpuBlockMover(cache, num_slots)
    from kvrelay.engine.cuda.block_mover import CudaBlockMover

    return CudaBlockMover(cache, num_slots)


def _synchronize(cache: torch.Tensor) -> None:
    if cache.is_cuda:
        torch.cuda.synchronize()


def print_table(found: dict[str, dict[str, float]], copies: dict[str, float], name: str) -> None:
    print(
        f"{name}, PyTorch {torch.__version__}; copies to the host {copies['to_host']:.1f} GB/s,"
        f" to the device {copies['to_device']:.1f} GB/s"
    )
    kinds = list(next(iter(found.values())))
    print(f"{'tokens':>8}" + "".join(f"{kind:>12}" for kind in kinds))
    for num_tokens, row in found.items():
        print(f"{num_tokens:>8}" + "".join(f"{row[kind]:>12.2f}" for kind in kinds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--prompts", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    prompts = args.prompts or ([64, 128, 240] if args.device == "cpu" else [4096, 8192, 15000])
    options = Options(args.device, prompts, args.repeats)
    host_kv_bytes = options.num_host_pools * options.num_blocks * options.block_bytes
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        (folder / "config.json").write_text(json.dumps(options.shape))
        tiered = BenchedEngine(folder, options, host_kv_bytes=host_kv_bytes)
        plain = BenchedEngine(folder, options, host_kv_bytes=0)
        found = measure(tiered, plain, options)
    copies = copy_gb_per_s(options)
    name = torch.cuda.get_device_name() if options.device != "cpu" else "CPU"
    if args.json:
        print(json.dumps({"device": name, "ms": found, "copy_gb_per_s": copies}))
        return
    print_table(found, copies, name)


if __name__ == "__main__":
    main()
