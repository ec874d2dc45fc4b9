"""Kernels run on torch's threads, are compiled once, and can be done without."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from kvrelay.engine import device
from kvrelay.engine.attention import Span
from kvrelay.engine.compiled.arithmetic import exp, pointer
from kvrelay.engine.compiled.kernel import Kernel
from kvrelay.engine.compiled.openmp import OpenMP, own_share, thread_index
from kvrelay.engine.compiled.row_kernels import write_kernel
from kvrelay.engine.compiled.rows import CompiledRows
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.cpu_attention import CpuAttention
from kvrelay.engine.row_operations import TorchRows
from kvrelay.engine.torch_engine import TorchEngine


def sharing_kernel():
    def note_own_share(arguments):
        owners = pointer(arguments[0], np.int64)
        first, last = own_share(arguments[1])
        for item in range(first, last):
            owners[item] += 1 + thread_index()

    return note_own_share


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
def test_each_of_torchs_threads_takes_its_share_and_no_item_is_left_out(num_threads):
    kernel, owners = Kernel(OpenMP(), sharing_kernel(), "test"), np.zeros(100, dtype=np.int64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        kernel(1 << 30, owners.ctypes.data, len(owners))
    finally:
        torch.set_num_threads(before)
    assert sorted(set(owners.tolist())) == list(range(1, num_threads + 1))
    assert max(np.bincount(owners)[1:]) - min(np.bincount(owners)[1:]) <= 1


def test_small_work_wakes_no_other_thread():
    kernel, owners = Kernel(OpenMP(), sharing_kernel(), "test"), np.zeros(100, dtype=np.int64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        kernel(len(owners), owners.ctypes.data, len(owners))
    finally:
        torch.set_num_threads(before)
    assert set(owners.tolist()) == {1}


def exp_kernel():
    def exps(arguments):
        values = pointer(arguments[0], np.float32)
        for index in range(arguments[1]):
            values[index] = exp(values[index])

    return exps


def exps_of(values):
    results = np.array(values, dtype=np.float32)
    Kernel(OpenMP(), exp_kernel(), "test")(1, results.ctypes.data, len(results))
    return results


def test_exp_is_accurate_to_a_few_units_in_the_last_place():
    values = np.linspace(-87, 88, 100_001, dtype=np.float32)
    expected = np.exp(values.astype(np.float64))
    assert np.max(np.abs(exps_of(values) / expected - 1)) < 5e-7


def test_exp_beyond_its_range():
    values = exps_of([-np.inf, -3e38, -200, 0, 200, 3e38, np.inf, np.nan])
    assert np.array_equal(values, np.array([0, 0, 0, 1, *[np.inf] * 3, np.nan], np.float32), equal_nan=True)


@pytest.mark.skipif(sys.platform != "linux", reason="lists threads in /proc")
def test_work_of_any_size_keeps_torchs_threads_alive():
    kernel, owners = Kernel(OpenMP(), sharing_kernel(), "test"), np.zeros(100, dtype=np.int64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        kernel(1 << 30, owners.ctypes.data, len(owners))
        threads = set(os.listdir("/proc/self/task"))
        for num_elements in (100, 20_000, 40_000, 1 << 30):
            kernel(num_elements, owners.ctypes.data, len(owners))
        assert set(os.listdir("/proc/self/task")) == threads
    finally:
        torch.set_num_threads(before)


def test_torch_on_another_openmp_library_falls_back(monkeypatch, caplog):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # Whatever is set in the one that is found.
    with caplog.at_level(logging.INFO):
        cpu = device.CpuDevice()
    assert "another OpenMP library" in caplog.text
    assert isinstance(cpu.rows(torch.float32, 8, 1e-5), TorchRows)


def test_a_torch_without_gccs_entry_points_falls_back(monkeypatch, caplog):
    monkeypatch.setattr("kvrelay.engine.compiled.openmp.ctypes.CDLL", lambda path: object())
    with caplog.at_level(logging.INFO):
        cpu = device.CpuDevice()
    assert "no kernels" in caplog.text
    assert isinstance(cpu.rows(torch.float32, 8, 1e-5), TorchRows)


def test_two_engine_threads_at_once_get_what_each_gets_alone():
    gate_up = [torch.randn(64, 1152, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    operations = [CompiledRows(OpenMP(), torch.float32, 64, 1e-5) for _ in gate_up]
    alone = [rows.gate(values) for rows, values in zip(operations, gate_up, strict=True)]

    def repeat(index):
        return all(torch.equal(operations[index].gate(gate_up[index]), alone[index]) for _ in range(100))

    with ThreadPoolExecutor(len(gate_up)) as pool:
        assert all(pool.map(repeat, range(len(gate_up))))


COUNT_THREADS = """
import os, torch
torch.set_num_threads(3)
torch.randn(512, 512) @ torch.randn(512, 512)
torch.randn(1 << 20).exp()
before = len(os.listdir("/proc/self/task"))
from kvrelay.engine.compiled.openmp import OpenMP
from kvrelay.engine.compiled.rows import CompiledRows
rows = CompiledRows(OpenMP(), torch.float32, 16, 1e-5)
rows.gate(torch.randn(512, 1024))
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "iomp" in line}
print(before, len(os.listdir("/proc/self/task")), len(libraries))
"""


def run_python(code, **environ):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_kernels_bring_no_threads_and_no_openmp_of_their_own():
    before, after, num_libraries = map(int, run_python(COUNT_THREADS))
    assert after == before >= 3
    assert num_libraries == 1


COMPILE = """
import numpy
from kvrelay.engine.compiled.kernel import Kernel
from kvrelay.engine.compiled.openmp import OpenMP
from kvrelay.engine.compiled.row_kernels import write_kernel
print(Kernel(OpenMP(), write_kernel(numpy.float32), "float32").compiled.cache_hits)
"""


def test_a_second_process_finds_kernels_compiled(tmp_path):
    assert run_python(COMPILE, KVRELAY_CACHE=str(tmp_path)) == ["0"]
    assert run_python(COMPILE, KVRELAY_CACHE=str(tmp_path)) == ["1"]


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("num_bytes_left", [0, 20])
def test_a_damaged_cache_is_made_anew(tmp_path, suffix, num_bytes_left):
    run_python(COMPILE, KVRELAY_CACHE=str(tmp_path))
    (damaged,) = tmp_path.rglob(f"*{suffix}")
    damaged.write_bytes(damaged.read_bytes()[:num_bytes_left])
    for hits in ("0", "0", "1"):  # The first compiles without a cache, the second fills it.
        assert run_python(COMPILE, KVRELAY_CACHE=str(tmp_path)) == [hits]


def test_kernels_do_without_a_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVRELAY_CACHE", str(tmp_path / "file"))
    assert Kernel(OpenMP(), write_kernel(np.uint16), "bfloat16").compiled.cache_hits == 0


def test_without_numba_torch_does_the_work_and_the_log_says_so(monkeypatch, caplog):
    for name in [name for name in sys.modules if name.startswith("kvrelay.engine.compiled")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    with caplog.at_level(logging.INFO):
        cpu = device.CpuDevice()
    assert "numba" in caplog.text
    assert isinstance(cpu.attention(torch.zeros(1, 2, 2, 4, 1, 8), 1), CpuAttention)
    assert isinstance(cpu.rows(torch.float32, 8, 1e-5), TorchRows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_and_without_numba_logprobs_agree(tiny_llama, drive, request_of, prompt_of, monkeypatch, dtype):
    requests = [request_of(prompt_of(40 + 7 * variant, variant), num_logprobs=1) for variant in range(4)]
    config = EngineConfig(str(tiny_llama), num_blocks=200, block_size=8, max_num_seqs=16, dtype=dtype)
    logprobs = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(device, "_openmp", lambda: None)
        driver = drive(TorchEngine(config))
        for index, request in enumerate(requests):
            driver.engine.submit(request, f"k{index}")
        driver.run()
        outputs = [driver.outputs[f"k{index}"] for index in range(4)]
        logprobs.append([output.logprobs.chosen for of_one in outputs for output in of_one[:1]])
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4 if dtype == "float32" else 0.3)


def test_fallback_tokens_equal_ours(tiny_llama, drive, request_of, prompt_of, monkeypatch):
    requests = [request_of(prompt_of(9 + 40 * variant, variant), max_tokens=40) for variant in range(8)]
    config = EngineConfig(str(tiny_llama), num_blocks=400, block_size=8, max_num_seqs=16)
    ours = drive(TorchEngine(config)).generate(*requests)
    monkeypatch.setattr(device, "_openmp", lambda: None)
    assert drive(TorchEngine(config)).generate(*requests) == ours


def test_fallback_rows_are_the_same_bits_alone_and_among_others():
    cache = torch.randn(1, 2, 40, 8, 2, 16, generator=torch.Generator().manual_seed(1))
    spans = [Span([index * 5 + block for block in range(5)], 4 * index + 2, 1) for index in range(8)]
    queries = torch.randn(8, 4, 16, generator=torch.Generator().manual_seed(2))
    attention = CpuAttention(cache, 4)
    attention.begin(spans, torch.empty(0, dtype=torch.int64))
    together = attention.attend(0, queries)
    for row, span in enumerate(spans):
        attention.begin([span], torch.empty(0, dtype=torch.int64))
        assert torch.equal(attention.attend(0, queries[row : row + 1])[0], together[row])
