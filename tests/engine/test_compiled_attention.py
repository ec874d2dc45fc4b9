"""Attention by our own kernels: what float64 says, the same bits in any company, and never a free slot's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvrelay.engine.attention import Span
from kvrelay.engine.compiled.attention import CompiledAttention
from kvrelay.engine.compiled.openmp import OpenMP
from kvrelay.engine.cpu_attention import CpuAttention

SHAPES = {
    # block_size, num_kv_heads, query heads per KV head, head_dim
    "smollm2": (16, 3, 3, 64),
    "one-kv-head": (8, 1, 4, 32),
    "no-groups": (4, 4, 1, 128),
    "groups-of-eight": (16, 2, 8, 128),
    "odd": (5, 2, 7, 24),
    "blocks-of-one": (1, 2, 2, 16),
}
LAYER = 1


class Case:
    """Random sequences over scattered blocks; every slot that belongs to none of them holds NaN."""

    def __init__(self, shape: str, dtype: torch.dtype, lengths: list[int], seed: int = 0) -> None:
        self.block_size, self.num_kv_heads, group, self.head_dim = SHAPES[shape]
        self.num_heads = self.num_kv_heads * group
        generator = torch.Generator().manual_seed(seed)
        needed = [-(-length // self.block_size) for length in lengths]
        num_blocks = sum(needed) + 3
        order = torch.randperm(num_blocks, generator=generator).tolist()
        self.spans = []
        for length, num in zip(lengths, needed, strict=True):
            self.spans.append(Span(order[:num], length - 1, 1))
            order = order[num:]
        size = (2, 2, num_blocks, self.block_size, self.num_kv_heads, self.head_dim)
        self.cache = torch.full(size, float("nan"), dtype=dtype)
        for span in self.spans:
            self.slots(span, 0)[:] = torch.randn(
                span.end, self.num_kv_heads, self.head_dim, generator=generator
            )
            self.slots(span, 1)[:] = torch.randn(
                span.end, self.num_kv_heads, self.head_dim, generator=generator
            )
        # Rows further apart than they are long, as when they are part of a merged projection.
        merged = torch.randn(len(lengths), self.num_heads + 2, self.head_dim, generator=generator)
        self.queries = (3 * merged).to(dtype)[:, : self.num_heads]

    def slots(self, span: Span, part: int) -> _Slots:
        return _Slots(self.cache[LAYER, part].flatten(0, 1), self._indices(span))

    def _indices(self, span: Span) -> torch.Tensor:
        blocks = torch.tensor(span.block_table)[:, None] * self.block_size
        return (blocks + torch.arange(self.block_size)).flatten()[: span.end]

    def attend(self, rows: list[int]) -> torch.Tensor:
        attention = CompiledAttention(
            OpenMP(), self.cache, self.num_heads, CpuAttention(self.cache, self.num_heads)
        )
        attention.begin([self.spans[row] for row in rows], torch.empty(0, dtype=torch.int64))
        queries = self.queries if rows == list(range(len(self.spans))) else self.queries[rows]
        return attention.attend(LAYER, queries)

    def expected(self, row: int) -> torch.Tensor:
        span = self.spans[row]
        keys, values = (self.slots(span, part).read().double() for part in (0, 1))
        queries = self.queries[row].double().view(self.num_kv_heads, -1, self.head_dim)
        scores = torch.einsum("hgd,nhd->hgn", queries, keys) / self.head_dim**0.5
        return torch.einsum("hgn,nhd->hgd", scores.softmax(-1), values).reshape(self.num_heads, self.head_dim)


class _Slots:
    def __init__(self, all_slots: torch.Tensor, indices: torch.Tensor) -> None:
        self._all_slots = all_slots
        self._indices = indices

    def read(self) -> torch.Tensor:
        return self._all_slots[self._indices]

    def __setitem__(self, _: slice, values: torch.Tensor) -> None:
        self._all_slots[self._indices] = values.to(self._all_slots.dtype)


@pytest.fixture(params=[1, 2, 3])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


LENGTHS = [1, 2, 3, 15, 16, 17, 64, 100, 255, 256, 257, 700]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_equals_float64_and_reads_no_free_slot(shape, dtype, tolerance, num_threads):
    case = Case(shape, dtype, LENGTHS, seed=num_threads)
    attended = case.attend(list(range(len(LENGTHS))))
    assert attended.dtype == dtype
    for row in range(len(LENGTHS)):
        expected = case.expected(row)
        error = (attended[row].double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance, f"context of {LENGTHS[row]}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bits_in_any_company(dtype, num_threads):
    case = Case("smollm2", dtype, LENGTHS)
    together = case.attend(list(range(len(LENGTHS))))
    backwards = case.attend(list(range(len(LENGTHS)))[::-1]).flip(0)
    alone = torch.cat([case.attend([row]) for row in range(len(LENGTHS))])
    assert torch.equal(together, alone)
    assert torch.equal(together, backwards)
    torch.set_num_threads(1)
    assert torch.equal(together, case.attend(list(range(len(LENGTHS)))))


def test_a_nan_in_a_context_shows_in_its_row_alone():
    case = Case("smollm2", torch.float32, [20, 40, 60])
    case.slots(case.spans[1], 0)._all_slots[case.spans[1].block_table[1] * case.block_size] = float("nan")
    attended = case.attend([0, 1, 2])
    assert attended[1].isnan().all()
    assert not attended[[0, 2]].isnan().any()


def test_scores_beyond_any_exponent_pick_the_highest():
    case = Case("smollm2", torch.float32, [50])
    case.queries *= 1e4
    keys = case.slots(case.spans[0], 0).read().view(50, 3, 1, 64)
    highest = (case.queries.view(3, 3, 64) * keys).sum(-1).argmax(0)
    values = case.slots(case.spans[0], 1).read()
    picked = torch.stack([values[highest[head // 3, head % 3], head // 3] for head in range(9)])
    assert torch.allclose(case.attend([0])[0], picked, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_tokens_and_chunks_of_one_step_are_written_and_attended_as_by_torch(dtype):
    def run(make_attention):
        cache = torch.full((2, 2, 12, 4, 2, 16), float("nan"), dtype=dtype)
        generator = torch.Generator().manual_seed(5)
        attention = make_attention(cache)
        results = []
        for spans in (
            [Span([3, 1], 0, 6), Span([7], 0, 3)],
            [Span([3, 1], 6, 1), Span([7, 9, 5], 3, 6)],
            [Span([3, 1], 7, 1), Span([7, 9, 5], 9, 1)],
        ):
            slots = [
                span.block_table[position // 4] * 4 + position % 4
                for span in spans
                for position in range(span.start, span.end)
            ]
            merged = torch.randn(len(slots), 8, 16, generator=generator).to(dtype)
            attention.begin(spans, torch.tensor(slots))
            attention.write(LAYER, merged[:, 4:6], merged[:, 6:])
            results.append(attention.attend(LAYER, merged[:, :4]))
        return torch.cat(results), cache

    ours, our_cache = run(lambda cache: CompiledAttention(OpenMP(), cache, 4, CpuAttention(cache, 4)))
    theirs, their_cache = run(lambda cache: CpuAttention(cache, 4))
    assert np.array_equal(our_cache.float().numpy(), their_cache.float().numpy(), equal_nan=True)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
