"""Kernels launched by their handles give what Triton's own launches give.

Skipped where there is no GPU: `make test-gpu` runs them on a machine that has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [(1, 1), (1, 16), (1, 4096), (3, 4096), (5, 100), (16, 576), (7, 1537), (1024, 4096)]
"""Rows and columns: of one, of multiples of 16, and odd."""


def of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def ordinary_and_by_handle(
    run: Callable[[Any], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """`run` is given fresh rows' operations; by handle is its second call."""
    from kvrelay.engine.cuda import compiled_launch
    from kvrelay.engine.cuda.rows import CudaRows

    with monkeypatch.context() as patch:
        patch.setattr(compiled_launch, "MAX_HANDLES", 0)
        ordinary = run(CudaRows(1e-5))
    by_handle = CudaRows(1e-5)
    run(by_handle)
    kept = [len(launch._handles) for launch in vars(by_handle).values() if hasattr(launch, "_handles")]
    assert sum(kept) == 1, "the launch by handle is none"
    return ordinary, run(by_handle)


def test_this_triton_s_handles_are_known() -> None:
    from kvrelay.engine.cuda.compiled_launch import _stream_lookup

    assert _stream_lookup() is not None


@pytest.mark.parametrize(("num_rows", "size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms(num_rows: int, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = of(num_rows, size, dtype=dtype), of(size, dtype=dtype)
    ordinary, handle = ordinary_and_by_handle(lambda rows: rows.rms_norm(hidden, weight), monkeypatch)
    assert torch.equal(ordinary, handle)
    wanted = torch.nn.functional.rms_norm(hidden.float(), (size,), weight.float(), 1e-5)
    assert torch.allclose(handle.float(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("num_rows", "size"), SHAPES)
def test_gates(num_rows: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up = of(num_rows, 2 * size)
    ordinary, handle = ordinary_and_by_handle(lambda rows: rows.gate(gate_up), monkeypatch)
    assert torch.equal(ordinary, handle)
    gate, up = gate_up.float().chunk(2, 1)
    wanted = torch.nn.functional.silu(gate) * up
    assert torch.allclose(handle.float(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("num_rows", [1, 3, 16, 1024])
@pytest.mark.parametrize(("num_heads", "num_values", "head_dim"), [(1, 1, 16), (9, 3, 64), (40, 8, 128)])
def test_rotations(
    num_rows: int, num_heads: int, num_values: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of heads that lie among others, which stay as they are."""
    projected = of(num_rows, num_heads + num_values, head_dim)
    cosines, sines = of(num_rows, 1, head_dim), of(num_rows, 1, head_dim // 2)

    def rotate(rows: Any) -> torch.Tensor:
        whole = projected.clone()
        rows.rotate(whole[:, :num_heads], cosines, sines)
        return whole

    ordinary, handle = ordinary_and_by_handle(rotate, monkeypatch)
    assert torch.equal(ordinary, handle)
    assert not torch.equal(handle[:, :num_heads], projected[:, :num_heads])
    assert torch.equal(handle[:, num_heads:], projected[:, num_heads:])


@pytest.mark.parametrize("num_rows", [1, 3, 1024])
@pytest.mark.parametrize(("num_queries", "num_keys", "head_dim"), [(1, 1, 16), (9, 3, 64), (32, 8, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_of_heads(
    num_rows: int,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Queries and keys have different weights; the values beside them stay as they are."""
    from kvrelay.engine.row_operations import TorchRows

    num_heads = num_queries + num_keys
    projected = of(num_rows, num_heads + num_keys, head_dim, dtype=dtype)
    query_norm, key_norm = of(head_dim, dtype=dtype), of(head_dim, dtype=dtype)

    def norm(rows: Any) -> torch.Tensor:
        whole = projected.clone()
        rows.norm_heads(whole[:, :num_heads], num_queries, query_norm, key_norm)
        return whole

    ordinary, handle = ordinary_and_by_handle(norm, monkeypatch)
    assert torch.equal(ordinary, handle)
    wanted = TorchRows(1e-5).norm_heads(
        projected[:, :num_heads].float(), num_queries, query_norm.float(), key_norm.float()
    )
    assert torch.allclose(handle[:, :num_heads].float(), wanted, atol=2e-2, rtol=2e-2)
    assert torch.equal(handle[:, num_heads:], projected[:, num_heads:])


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_rows_at_odd_addresses(offset: int) -> None:
    """After a launch at even ones: their code would be misaligned there."""
    from kvrelay.engine.cuda.rows import CudaRows

    rows, weight = CudaRows(1e-5), of(4096)
    rows.rms_norm(of(5, 4096), weight)
    hidden = of(5 * 4096 + offset)[offset:].view(5, 4096)
    found, wanted = rows.rms_norm(hidden, weight), rows.rms_norm(hidden.clone(), weight)
    assert torch.allclose(found.float(), wanted.float(), rtol=1e-2)  # summed in another order, perhaps


def test_launches_go_to_the_current_stream_and_into_captured_graphs() -> None:
    from kvrelay.engine.cuda.rows import CudaRows

    rows, weight, hidden = CudaRows(1e-5), of(4096), of(4, 4096)
    rows.rms_norm(hidden, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rows.rms_norm(hidden, weight)
    fresh = of(4, 4096)
    hidden.copy_(fresh)
    graph.replay()
    assert torch.equal(captured, rows.rms_norm(fresh, weight))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        hidden.zero_()
        found = rows.rms_norm(hidden, weight)
    side.synchronize()
    assert not found.any(), "it did not wait for what its stream had queued"
