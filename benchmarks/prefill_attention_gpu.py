"""What prefill attention takes on one GPU: as the engine does it, beside PyTorch's own ways.

    python -m benchmarks.prefill_attention_gpu

Llama-3.1-8B's heads, bfloat16, one layer. `first call`: cuDNN through PyTorch at lengths that this thread,
and then another one, sees for the first time: what a prompt of a new length would wait for. `chunks`:
milliseconds of a chunk in the midst of a prompt, by FlashAttention's mask that ends at the lower right and
as `PrefillAttention` does it. Queries, keys and values lie side by side, as the model leaves them.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
NEW_LENGTHS = (1001, 1002, 4001, 4002)
CHUNKS = ((8192, 0), (4096, 0), (1024, 0), (1000, 0), (8192, 6808), (8192, 24576), (512, 7680))
DEVICE = torch.device("cuda", 0)


def draw(num_rows: int, num_heads: int) -> Tensor:
    return torch.randn((num_rows, num_heads, HEAD_DIM), dtype=torch.bfloat16, device=DEVICE)


def heads_first(rows: Tensor) -> Tensor:
    return rows.transpose(0, 1).unsqueeze(0)


def once_ms(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - began_s) * 1e3


def best_ms(call: Callable[[], object], repeats: int = 10) -> float:
    once_ms(call)
    return min(once_ms(call) for _ in range(repeats))


def sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    mask = causal_lower_right(len(queries), len(keys)) if len(queries) != len(keys) else None
    return F.scaled_dot_product_attention(
        *map(heads_first, (queries, keys, values)), attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


def first_calls(who: str) -> None:
    torch.cuda.set_device(DEVICE)
    for length in NEW_LENGTHS:
        rows = (draw(length, HEADS), draw(length, KV_HEADS), draw(length, KV_HEADS))
        first, second = once_ms(lambda rows=rows: sdpa(*rows)), once_ms(lambda rows=rows: sdpa(*rows))  # type: ignore[misc]
        print(f"{who:14}{length:>7} tokens: first call {first:7.1f} ms, second {second:6.2f} ms", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    from kvrelay.engine.cuda.prefill_attention import PrefillAttention  # which needs Triton

    warm = (draw(512, HEADS), draw(512, KV_HEADS), draw(512, KV_HEADS))
    once_ms(lambda: sdpa(*warm))
    first_calls("this thread")
    other = threading.Thread(target=first_calls, args=("another thread",))
    other.start()
    other.join()
    attention = PrefillAttention(HEADS, KV_HEADS, HEAD_DIM, torch.bfloat16, DEVICE)
    took_ms = once_ms(lambda: attention.prepare_thread(8192, 32768))
    print(f"\nplans for chunks of up to 8,192 tokens: {took_ms:.0f} ms")
    for num_queries, num_earlier in CHUNKS:
        queries, own, values = draw(num_queries, HEADS + 2 * KV_HEADS).split([HEADS, KV_HEADS, KV_HEADS], 1)
        earlier = draw(num_earlier, KV_HEADS)
        keys = torch.cat((earlier, own))
        theirs = best_ms(partial(sdpa, queries, keys, keys))
        if num_earlier:
            ours = best_ms(partial(attention.attend_after, queries, own, values, earlier, earlier))
        else:
            ours = best_ms(partial(attention.attend, queries, own, values))
        print(
            f"{num_queries:>6} queries after {num_earlier:>6}: PyTorch {theirs:7.3f} ms, ours {ours:7.3f} ms"
        )


if __name__ == "__main__":
    main()
