"""Row operations by our own kernels give what torch's give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from kvrelay.engine.compiled.openmp import OpenMP
from kvrelay.engine.compiled.rows import CompiledRows
from kvrelay.engine.model.rope import apply_rope

HEAD_DIM = 24
DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)]


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def rows(request):
    dtype, tolerance = request.param
    compiled = CompiledRows(OpenMP(), dtype, HEAD_DIM, 1e-5)
    compiled.dtype, compiled.tolerance = dtype, tolerance
    return compiled


def random(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def check(actual, expected, tolerance):
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs() / expected.abs().clamp(min=expected.abs().mean())
    assert error.max() < tolerance


@pytest.mark.parametrize("shape", [(1, 7), (5, 576), (3, 4, 64)])
def test_rms_norm(rows, shape):
    values, weight = random(*shape, dtype=rows.dtype), random(shape[-1], dtype=rows.dtype)
    expected = F.rms_norm(values.double(), weight.shape, weight.double(), 1e-5)
    check(rows.rms_norm(values, weight), expected, rows.tolerance)


def test_rms_norm_of_a_part_of_wider_rows(rows):
    wide, weight = random(6, 5, 32, dtype=rows.dtype), random(32, dtype=rows.dtype)
    expected = F.rms_norm(wide[:, 1:3].double(), weight.shape, weight.double(), 1e-5)
    check(rows.rms_norm(wide[:, 1:3], weight), expected, rows.tolerance)


def test_gate(rows):
    gate_up = 4 * random(9, 2 * 37, dtype=rows.dtype)
    gate, up = gate_up.double().chunk(2, 1)
    check(rows.gate(gate_up.clone()), F.silu(gate) * up, rows.tolerance)


def test_gate_at_the_ends_of_the_range(rows):
    gate = [-3e38, -1e4, -100.0, -88.0, -60.0, 0.0, 60.0, 88.0, 100.0, 1e4, 3e38, float("nan")]
    gate_up = torch.tensor([gate + [1.0] * len(gate)]).to(rows.dtype)
    expected = F.silu(gate_up[:, : len(gate)].double())
    actual = rows.gate(gate_up.clone()).double()
    assert torch.allclose(actual, expected, rtol=rows.tolerance, atol=1e-24, equal_nan=True)


def test_rotation_mutates_heads_and_nothing_beside_them(rows):
    wide = random(7, 5, HEAD_DIM, dtype=rows.dtype)
    before = wide.clone()
    angles = random(7, 1, HEAD_DIM // 2, dtype=torch.float32)
    cosines = torch.cat((angles.cos(), angles.cos()), 2).to(rows.dtype)
    sines = angles.sin().to(rows.dtype)
    expected = apply_rope(before[:, :3].double(), cosines.double(), sines.double())
    check(rows.rotate(wide[:, :3], cosines, sines), expected, rows.tolerance)
    assert torch.equal(wide[:, 3:], before[:, 3:])


def test_rows_are_the_same_bits_alone_and_among_others(rows):
    gate_up, weight = random(64, 2 * 576, dtype=rows.dtype), random(2 * 576, dtype=rows.dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        normed, gated = rows.rms_norm(gate_up, weight), rows.gate(gate_up)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(normed, torch.cat([rows.rms_norm(row[None], weight) for row in gate_up]))
    assert torch.equal(gated, torch.cat([rows.gate(row[None]) for row in gate_up]))
