"""Attention of single tokens: what a plain softmax over the gathered keys gives, however the work is split.

With ``TRITON_INTERPRET=1`` the kernels run on the CPU, slowly: so they can be tried without a GPU.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or IS_INTERPRETED), reason="needs a CUDA device, or Triton's interpreter"
)
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
HALF = torch.float16 if IS_INTERPRETED else torch.bfloat16
"""The interpreter's products of bfloat16 are wrong."""
BLOCK_SIZE = 16
SHAPES = [(32, 8, 128), (9, 3, 64), (4, 4, 80)]
"""Heads, KV heads, head size."""
BATCHES = {
    "one long": [5000],
    "one short": [1],
    "padding": [70, 0, 3, 0],
    "long among short": [40] * 40 + [9000],
    "more rows than items": [random.Random(1).randrange(1, 200) for _ in range(150)],
    "edges of tiles": [63, 64, 65, 127, 128, 129, 4096, 4097],
}


def expected(
    queries: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], slots: Sequence[torch.Tensor]
) -> torch.Tensor:
    """By definition, in float64; zeros without keys."""
    out = torch.zeros(queries.shape, dtype=torch.float64, device=queries.device)
    for row, its_slots in enumerate(slots):
        if not len(its_slots):
            continue
        keys, values = (part[its_slots].double() for part in cache)
        keys, values = (
            part.repeat_interleave(queries.shape[1] // part.shape[1], 1) for part in (keys, values)
        )
        scores = torch.einsum("hd,khd->hk", queries[row].double(), keys) * queries.shape[2] ** -0.5
        out[row] = torch.einsum("hk,khd->hd", scores.softmax(1), values)
    return out


@pytest.mark.parametrize("num_keys", BATCHES.values(), ids=list(BATCHES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_attention_is_that_of_the_definition(
    shape: tuple[int, int, int], num_keys: list[int], dtype: torch.dtype
) -> None:
    from kvrelay.engine.cuda.decode_attention import DecodeAttention, DecodeInputs

    num_heads, num_kv_heads, head_dim = shape
    generator = torch.Generator(DEVICE).manual_seed(7)
    lengths = [-(-count // BLOCK_SIZE) for count in num_keys]
    blocks = torch.randperm(sum(lengths) + 5, generator=generator, device=DEVICE)
    tables = torch.zeros((len(num_keys) + 2, max(lengths) + 3), dtype=torch.int32, device=DEVICE)
    slots, taken = [], 0
    for row, (count, length) in enumerate(zip(num_keys, lengths, strict=True)):
        own = blocks[taken : taken + length]
        taken += length
        tables[row, :length] = own
        within = torch.arange(BLOCK_SIZE, device=DEVICE)
        slots.append((own[:, None] * BLOCK_SIZE + within).flatten()[:count])

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=DEVICE).to(dtype)

    cache_size = (len(blocks) * BLOCK_SIZE, num_kv_heads, head_dim)
    cache = (draw(*cache_size), draw(*cache_size))
    attention = DecodeAttention(num_heads, num_kv_heads, head_dim, BLOCK_SIZE, DEVICE)
    counts = torch.tensor([*num_keys, 77, 77], dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # the second time nothing may be left of the first
        queries = draw(len(num_keys), num_heads, head_dim)
        attention.begin(DecodeInputs(len(num_keys), tables, counts))
        for _ in range(2):  # two layers of a step
            out = torch.full_like(queries, float("nan"))
            attention.attend(queries, *cache, out)
            tolerance = 2e-5 if dtype is torch.float32 else 1e-2
            torch.testing.assert_close(
                out.double(), expected(queries, cache, slots), atol=tolerance, rtol=tolerance
            )
