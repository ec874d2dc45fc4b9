"""kvrelay beside vLLM on one pair of GPUs, one after the other, asked the same things at the same times.

    python -m benchmarks.pd_gpu --vllm PATH [--systems kvrelay vllm-1p1d vllm-collocated]
        [--cells 4096:4 4096:8 1024:8 1024:16] [--idle 1024 4096 8192] [--seconds 40] [--limit-s 1500]
        [--json FILE] [--earlier FILE ...] [--work FOLDER]

* `kvrelay`: a router, a prefill and a decode node.
* `vllm-1p1d`: one prefill and one decode server over vLLM's NIXL connector, KV blocks across layers; this
  process is the proxy between the two legs, as vLLM's example proxy does it.
* `vllm-collocated`: two whole servers with chunks of 512 tokens, requests to each in turn.

The shape is Llama-3.1-8B's with random weights in bfloat16; no prompt is like another, so prefix caches don't
matter. A cell is INPUT:RATE, input tokens and Poisson arrivals a second. Per system and cell: TTFT, ITL over
all gaps, `second` (second token minus first: the handover), in ms, and goodput, the share of all requests
with TTFT <= 500 ms and their own p99 ITL <= 25 ms. For `vllm-1p1d` the first token counts when the prefill
leg has returned it. Kinder to handovers are `goodput later`, without the gap from the first to the second
token, and `goodput of decode`, of what the decode server streams alone, from its own first token on. A failed
request is counted and left out of the times. What did not fit into `--limit-s` is named.

With `--json` all figures and every token's time are written after each cell; figures of `--earlier` such
files, from the same GPUs, join the ratios. `--work` keeps logs and vLLM's compiled graphs for the next start.
`--device cpu` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.engine_gpu import LLAMA_3_1_8B
from benchmarks.kvrelay_pair import KvrelayTarget, PairSettings, running_pair
from benchmarks.load import (
    Cell,
    Request,
    Target,
    idle_summary,
    load_summary,
    request_row,
    run_cell,
    run_idle,
)
from benchmarks.local_cluster import StartFailed
from benchmarks.pd_report import idle_line, load_line, print_ratios
from benchmarks.vllm_servers import (
    COLLOCATED,
    SPLIT,
    VLLMSettings,
    log_tails,
    open_target,
    running_servers,
)
from kvrelay.client import AsyncClient

SYSTEMS = ("kvrelay", "vllm-1p1d", "vllm-collocated")
START_S = {"kvrelay": 45.0, "vllm-1p1d": 160.0, "vllm-collocated": 160.0}
"""How long a start is expected to take."""
START_LIMIT_S, STOP_S = 300.0, 30.0
WARM_UP_S, DRAIN_S, IDLE_S = 3.0, 8.0, 8.0
"""What a cell takes beside its own seconds, and an idle row in all, as far as one can expect."""
FREE_MIB, FREE_TIMEOUT_S = 2000, 60.0
OpenTarget = Callable[[], Any]
"""Gives an asynchronous context manager of a `Target`."""


class Run:
    """What has been measured so far, what is left of the time, and the file that both go to."""

    def __init__(self, args: argparse.Namespace, vocab_size: int) -> None:
        self.args = args
        self.vocab_size = vocab_size
        self.found: dict[str, Any] = {"args": {**vars(args)}, "systems": {}, "not run": []}
        self._end_s: float = time.monotonic() + args.limit_s

    @property
    def left_s(self) -> float:
        return self._end_s - time.monotonic()

    def has_time(self, what: str, needed_s: float) -> bool:
        """Whether there is time for it; else it is named as not run."""
        if self.left_s >= needed_s + STOP_S:
            return True
        self.leave_out(what, f"{self.left_s:.0f} s are left, it takes some {needed_s + STOP_S:.0f} s")
        return False

    def leave_out(self, what: str, why: str) -> None:
        self.found["not run"].append({"what": what, "why": why})
        print(f"{what}: not run: {why}", flush=True)

    def enter(self, system: str, kind: str, name: str, requests: Sequence[Request]) -> None:
        """Figures and rows of one cell; printed, and on disk before the next begins."""
        figures = idle_summary(requests) if kind == "idle" else load_summary(requests)
        begin_s = requests[0].due_s
        rows = [request_row(request, begin_s) for request in requests]
        errors = sorted({request.error for request in requests if request.error})[:5]
        self.found["systems"].setdefault(system, {"idle": {}, "load": {}})[kind][name] = {
            **figures,
            "errors": errors,
            "rows": rows,
        }
        line = idle_line if kind == "idle" else load_line
        print(f"{system:16}{name:10}{line(figures)}", flush=True)
        for error in errors:
            print(f"    failed: {error}", flush=True)
        self.write()

    def write(self) -> None:
        file: Path | None = self.args.json
        if file is not None:
            partial = file.with_name(file.name + ".partial")
            partial.write_text(json.dumps(self.found, separators=(",", ":"), default=str))
            os.replace(partial, file)


async def measure(run: Run, system: str, open_it: OpenTarget, logs: Path) -> None:
    """All of `system`'s cells for which there is time. Raises TimeoutError where one takes far longer."""
    args = run.args
    async with asyncio.timeout(run.left_s - STOP_S / 2), open_it() as target:
        await _warm_up(run, target)
        for num_input in args.idle:
            if run.has_time(f"{system} idle {num_input}", IDLE_S):
                requests = await run_idle(target, num_input, run.vocab_size)
                run.enter(system, "idle", str(num_input), requests)
                _print_logs_if_failed(requests, logs)
        for num_input, rate in args.cells:
            cell = Cell(num_input, rate, args.output, args.seconds)
            if run.has_time(f"{system} {cell.name}", WARM_UP_S + args.seconds + DRAIN_S):
                await run_cell(target, Cell(num_input, rate, 64, WARM_UP_S, "warm-up"), run.vocab_size)
                requests = await run_cell(target, cell, run.vocab_size)
                run.enter(system, "load", cell.name, requests)
                _print_logs_if_failed(requests, logs)


async def _warm_up(run: Run, target: Target) -> None:
    """Connections between the pair, kernels that are compiled when first needed."""
    for num_input in sorted({*run.args.idle, *(num_input for num_input, _ in run.args.cells)}):
        await run_cell(target, Cell(num_input, 4.0, 16, 2.0, "first"), run.vocab_size)


def _print_logs_if_failed(requests: Sequence[Request], logs: Path) -> None:
    if any(request.error for request in requests):
        print(log_tails(logs), flush=True)


@contextmanager
def running_system(run: Run, system: str, model: Path, logs: Path) -> Iterator[OpenTarget]:
    """Raises StartFailed."""
    args = run.args
    pair = PairSettings(model, args.max_model_len, args.device)
    if system == "kvrelay":
        with running_pair(pair, logs) as address:
            yield lambda: _kvrelay_target(address)
        return
    mode = SPLIT if system == "vllm-1p1d" else COLLOCATED
    settings = VLLMSettings(
        args.vllm, model, args.max_model_len, logs, not pair.has_weights, tuple(args.vllm_flags.split())
    )
    with running_servers(mode, settings, min(START_LIMIT_S, run.left_s - STOP_S)) as urls:
        yield lambda: open_target(urls, mode, args.vllm)


@asynccontextmanager
async def _kvrelay_target(address: str) -> AsyncIterator[KvrelayTarget]:
    async with AsyncClient(address) as client:
        yield KvrelayTarget(client)


def run_system(run: Run, system: str, model: Path, work_folder: Path) -> None:
    """From free GPUs to free GPUs."""
    shortest_s = IDLE_S if run.args.idle else run.args.seconds + WARM_UP_S + DRAIN_S
    if not run.has_time(system, START_S[system] + shortest_s):
        return
    if run.args.device == "cuda" and (busy := wait_for_free_gpus()):
        run.leave_out(system, f"GPU memory is in use: {busy} MiB")
        return
    logs = work_folder / system
    logs.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    try:
        with running_system(run, system, model, logs) as open_it:
            print(f"{system}: up after {time.monotonic() - began_s:.0f} s", flush=True)
            uvloop.run(measure(run, system, open_it, logs))
    except StartFailed as error:
        run.leave_out(system, str(error))
    except TimeoutError:
        run.leave_out(f"{system}, rest of its cells", "the time was over in the middle of one")
    except Exception:  # the other systems are still to be measured
        run.leave_out(f"{system}, rest of its cells", traceback.format_exc())
    run.write()


def wait_for_free_gpus() -> str:
    """What is in use on the GPUs after a while, in MiB; empty: next to nothing, or there is no nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    deadline_s = time.monotonic() + FREE_TIMEOUT_S
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"whether GPU memory is free can't be told: {error}", flush=True)
            return ""
        used = done.stdout.split()
        if all(int(mib) < FREE_MIB for mib in used):
            return ""
        if time.monotonic() > deadline_s:
            return ", ".join(used)
        time.sleep(0.5)


def read_earlier(files: Sequence[Path], found: dict[str, Any]) -> dict[str, Any]:
    """Systems of `found`, and those cells of earlier runs that it lacks."""
    systems: dict[str, Any] = {}
    for source in (*(json.loads(file.read_text()) for file in files), found):
        for system, kinds in source["systems"].items():
            for kind, cells in kinds.items():
                systems.setdefault(system, {"idle": {}, "load": {}})[kind].update(cells)
    return systems


def parse_cell(text: str) -> tuple[int, float]:
    num_input, rate = text.split(":")
    return int(num_input), float(rate)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--vllm", default="", metavar="PATH", help="goes in front of its PYTHONPATH")
    parser.add_argument("--vllm-flags", default="", help="follow all other flags of its servers")
    parser.add_argument(
        "--cells", nargs="*", type=parse_cell, default=[(4096, 4.0), (4096, 8.0), (1024, 8.0), (1024, 16.0)]
    )
    parser.add_argument("--idle", nargs="*", type=int, default=[1024, 4096, 8192])
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals, in each cell")
    parser.add_argument("--limit-s", type=float, default=1500.0, help="of the whole run")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--earlier", nargs="*", type=Path, default=[], metavar="FILE")
    parser.add_argument("--work", type=Path, metavar="FOLDER")
    parser.add_argument("--model", type=Path, help="a folder with another config.json, or a model")
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = args.model or folder
        if args.model is None:
            (folder / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
        run = Run(args, PairSettings(model, args.max_model_len).vocab_size)
        for system in args.systems:
            run_system(run, system, model, args.work or folder / "work")
    print_ratios(read_earlier(args.earlier, run.found))
    for item in run.found["not run"]:
        lines = item["why"].strip().splitlines()
        print(f"not run: {item['what']}: {lines[-1] if lines[0].startswith('Traceback') else lines[0]}")


if __name__ == "__main__":
    main()
