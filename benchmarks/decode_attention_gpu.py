"""What attention of one decode step takes on one GPU, by the contexts in the batch.

    python -m benchmarks.decode_attention_gpu [--layers 32]

Llama-3.1-8B's heads, bfloat16, blocks of 16 tokens drawn at random from the pool; a step of `--layers` layers
is captured as a CUDA graph, as the engine does it, and replayed; the layers have KV of their own, as far as
6 GB go, so that no cache of the GPU has it. `KV GB/s`: bytes of keys and values that the
step reads over its time, beside a device copy's bytes read and written. A batch whose contexts differ has to
read no more than one whose contexts are alike: what it takes longer is lost.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable

import torch

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
DEVICE = torch.device("cuda", 0)
COPY_BYTES = 1 << 30
MAX_KV_BYTES = 6_000_000_000


def batches() -> dict[str, list[int]]:
    """Contexts in tokens."""
    chance = random.Random(5)
    skewed = [min(32_768, int(200 * chance.paretovariate(0.9))) for _ in range(64)]
    return {
        "1 x 128": [128],
        "1 x 1,024": [1024],
        "1 x 8,192": [8192],
        "1 x 32,768": [32_768],
        "8 x 1,024": [1024] * 8,
        "32 x 300": [300] * 32,
        "32 x 1,500": [1500] * 32,
        "32 x 1,500, 1 x 4,096": [1500] * 32 + [4096],
        "34 x 1,500": [1500] * 34,
        "32 x 1,500, 1 x 32,768": [1500] * 32 + [32_768],
        "64, heavy tail": skewed,
        "128 x 300": [300] * 128,
        "128 x 2,000": [2000] * 128,
        "256 x 300": [300] * 256,
        "256 x 300, 1 x 16,384": [300] * 255 + [16_384],
    }


def best_ms(call: Callable[[], object], repeats: int = 20) -> float:
    call()
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        call()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began_s)
    return best * 1e3


def copy_gb_per_s() -> float:
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / best_ms(lambda: target.copy_(source)) / 1e6


def step_ms(contexts: list[int], num_layers: int) -> float:
    from kvrelay.engine.cuda.attention import CudaAttention
    from kvrelay.engine.cuda.decode_attention import DecodeInputs

    lengths = [-(-context // BLOCK_SIZE) for context in contexts]
    num_blocks = sum(lengths)
    layer_shape = (2, num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    num_distinct = min(num_layers, max(1, MAX_KV_BYTES // (2 * math.prod(layer_shape))))
    cache = torch.randn((num_distinct, *layer_shape), dtype=torch.bfloat16, device=DEVICE)
    attention = CudaAttention(cache, HEADS, max(lengths))
    order = torch.randperm(num_blocks, device=DEVICE).to(torch.int32)
    tables = torch.zeros((len(contexts), max(lengths)), dtype=torch.int32, device=DEVICE)
    for row, part in enumerate(order.split(lengths)):
        tables[row, : len(part)] = part
    num_keys = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    inputs = DecodeInputs(len(contexts), tables, num_keys)
    slots = torch.full((len(contexts),), -1, dtype=torch.int64, device=DEVICE)
    queries = torch.randn((len(contexts), HEADS, HEAD_DIM), dtype=torch.bfloat16, device=DEVICE)

    def run() -> None:
        attention.begin_decode(inputs, slots)
        for layer in range(num_layers):
            attention.attend(layer % num_distinct, queries)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return best_ms(graph.replay)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name(DEVICE)}; a device copy reads and writes {copy_gb_per_s():.0f} GB/s")
    for name, contexts in batches().items():
        took_ms = step_ms(contexts, args.layers)
        num_bytes = sum(contexts) * 2 * KV_HEADS * HEAD_DIM * 2 * args.layers
        print(f"{name:26}{took_ms:9.3f} ms {num_bytes / took_ms / 1e6:8.0f} KV GB/s", flush=True)


if __name__ == "__main__":
    main()
