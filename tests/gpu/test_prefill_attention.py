"""Attention of prefill chunks on a GPU, cuDNN's and FlashAttention's parts merged, against float32.

Skipped where there is no GPU: `make test-gpu` runs them on a machine that has one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 128
TOLERANCE = 1e-2


def draw(num_rows: int, num_heads: int) -> torch.Tensor:
    return torch.randn(num_rows, num_heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")


def project(num_rows: int) -> list[torch.Tensor]:
    """Queries, keys and values side by side in each row, as the model leaves them."""
    return list(
        draw(num_rows, NUM_HEADS + 2 * NUM_KV_HEADS).split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], 1)
    )


def expected(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    num_queries, num_keys = len(queries), len(keys)
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device="cuda").tril_(num_keys - num_queries)
    heads_first = [rows.float().transpose(0, 1).unsqueeze(0) for rows in (queries, keys, values)]
    attended = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
    return attended.squeeze(0).transpose(0, 1)


@pytest.mark.parametrize("num_queries", [1, 100, 1000, 1024, 1500, 2048])
@pytest.mark.parametrize("num_earlier", [0, 16, 1000, 1024, 1500, 3072, 5008])
def test_chunks_attend_as_in_float32(num_queries: int, num_earlier: int) -> None:
    from kvrelay.engine.cuda.prefill_attention import PrefillAttention

    torch.manual_seed(num_queries * 10_000 + num_earlier)
    attention = PrefillAttention(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, torch.bfloat16, torch.device("cuda", 0))
    queries = draw(num_queries, NUM_HEADS)
    keys, values = (draw(num_earlier + num_queries, NUM_KV_HEADS) for _ in range(2))
    if num_earlier:
        found = attention.attend_after(
            queries, keys[num_earlier:], values[num_earlier:], keys[:num_earlier], values[:num_earlier]
        )
    else:
        found = attention.attend(queries, keys, values)
    error = (found.float() - expected(queries, keys, values)).norm() / expected(queries, keys, values).norm()
    assert error < TOLERANCE
    assert found.shape == queries.shape


@pytest.mark.parametrize("num_queries", [1000, 1024, 1100, 1152, 2048])
@pytest.mark.parametrize("num_earlier", [0, 1000, 2048])
def test_chunks_attend_where_they_lie_as_in_float32(num_queries: int, num_earlier: int) -> None:
    """Lengths that are padded, and such that are not."""
    from kvrelay.engine.cuda.prefill_attention import PrefillAttention

    torch.manual_seed(num_queries * 10_000 + num_earlier)
    attention = PrefillAttention(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, torch.bfloat16, torch.device("cuda", 0))
    queries, keys, values = project(num_queries)
    before = [rows.clone() for rows in (queries, keys, values)]
    earlier_keys, earlier_values = (draw(num_earlier, NUM_KV_HEADS) for _ in range(2))
    if num_earlier:
        found = attention.attend_after(queries, keys, values, earlier_keys, earlier_values)
    else:
        found = attention.attend(queries, keys, values)
    wanted = expected(queries, torch.cat((earlier_keys, keys)), torch.cat((earlier_values, values)))
    assert (found.float() - wanted).norm() / wanted.norm() < TOLERANCE
    assert all(torch.equal(rows, old) for rows, old in zip((queries, keys, values), before, strict=True))


def test_plans_of_all_lengths_are_made_in_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is one of shapes and strides; chunks that are padded, and such that are not, find theirs."""
    from kvrelay.engine.cuda import prefill_attention

    attention = prefill_attention.PrefillAttention(
        NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, torch.bfloat16, torch.device("cuda", 0)
    )
    if not attention.uses_cudnn:
        pytest.skip("needs cuDNN's attention: Hopper or later")
    plans: set[object] = set()
    original = prefill_attention._cudnn

    def record(*rows: torch.Tensor, is_causal: bool) -> prefill_attention.Attended:
        plans.add((*((each.shape, each.stride()) for each in rows), is_causal))
        return original(*rows, is_causal=is_causal)

    monkeypatch.setattr(prefill_attention, "_cudnn", record)
    attention.prepare_thread(2048, 4096)
    prepared = set(plans)
    for num_queries in (300, 1000, 1024, 1100, 1152, 2000, 2048):
        attention.attend(*project(num_queries))
        for num_earlier in (1024, 1500, 2048):
            attention.attend_after(
                *project(num_queries), *(draw(num_earlier, NUM_KV_HEADS) for _ in range(2))
            )
    assert prepared
    assert not plans - prepared


def test_padding_of_an_earlier_chunk_does_not_show() -> None:
    """The rows behind a padded chunk are those of longer ones before it."""
    from kvrelay.engine.cuda.prefill_attention import PrefillAttention

    attention = PrefillAttention(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, torch.bfloat16, torch.device("cuda", 0))
    long = [draw(2000, heads) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]
    short = [draw(1100, heads) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]
    fresh = attention.attend(*short).clone()
    attention.attend(*long)
    assert torch.equal(attention.attend(*short), fresh)
