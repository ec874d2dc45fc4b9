"""One prefill and one decode node on two GPUs of one host, with a router: what a handoff costs, and what
arrives in time under load.

    python -m benchmarks.cluster_gpu [--json] [--rates 4 8] [--input 4096] [--output 256] [--seconds 40]
        [--idle 1024 4096 8192 15000 32768] [--model FOLDER]
    python -m benchmarks.cluster_gpu --disturb [--json] [--rates 4 8] [--input 4096] [--disturb-seconds 15]

The shape is Llama-3.1-8B's with random weights in bfloat16. Idle, one request at a time: the time to the
first token (TTFT), and the handoff cost: second token minus first, less one decode step (the median of
the later gaps). Under load requests arrive by a Poisson process, prompts are random tokens, no two alike;
per rate the percentiles of TTFT and of all gaps between tokens (ITL), and goodput: the share of requests
with TTFT of at most 500 ms and their own p99 ITL of at most 25 ms. `--disturb` measures the ITL of 32 long
answers alone and while handoffs arrive, see `benchmarks.decode_disturbance`. Times are the client library's,
in milliseconds, in this process. A failed request ends the benchmark: its figures would flatter.

`--device cpu` tries the script itself without a GPU, with a small `--model`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.decode_disturbance import Disturbance, disturbance_phases
from benchmarks.engine_gpu import LLAMA_3_1_8B
from benchmarks.kvrelay_pair import KvrelayTarget, PairSettings, running_pair
from benchmarks.load import Cell, Request, idle_summary, load_summary, run_cell, run_idle
from kvrelay.client import AsyncClient

MAX_MODEL_LEN = 33_024
WARM_UP_S = 3.0


def check(requests: Sequence[Request]) -> Sequence[Request]:
    failed = [request.error for request in requests if request.error]
    if failed:
        sys.exit(f"{len(failed)} of {len(requests)} requests failed: {failed[0]}")
    return requests


async def measure(args: argparse.Namespace, address: str, vocab_size: int) -> dict[str, Any]:
    """What `args` ask for, of the cluster at `address`."""
    async with AsyncClient(address) as client:
        target = KvrelayTarget(client)
        check(await run_idle(target, 512, vocab_size))
        if args.disturb:
            work = Disturbance(args.input, args.streams, args.disturb_seconds, vocab_size)
            return {"disturb": await measure_disturbance(args, target, work)}
        found: dict[str, Any] = {"idle": {}, "load": {}}
        for num_input in args.idle:
            found["idle"][num_input] = idle_summary(check(await run_idle(target, num_input, vocab_size)))
        for rate in args.rates:
            for seconds, seed in ((WARM_UP_S, "warm-up"), (args.seconds, "load")):
                cell = Cell(args.input, rate, args.output, seconds, seed)
                requests = check(await run_cell(target, cell, vocab_size))
            found["load"][rate] = load_summary(requests)
        return found


async def measure_disturbance(
    args: argparse.Namespace, target: KvrelayTarget, work: Disturbance
) -> list[dict[str, float]]:
    """One row a phase; printed as each ends."""
    rows = []
    async for rate, row in disturbance_phases(target, work, args.rates):
        rows.append({"rate": rate, **row})
        if not args.json:
            name = f"{rate:g}/s of {work.num_input}" if rate else "alone"
            print(f"{name:20}" + "".join(f"{key:>13} {value:7.2f}" for key, value in row.items()), flush=True)
    return rows


def print_rows(found: dict[str, Any], num_input: int) -> None:
    for kind, rows in found.items():
        for what, row in rows.items():
            name = f"{what} tokens, idle" if kind == "idle" else f"{what:g}/s of {num_input}"
            print(f"{name:20}" + "".join(f"{key:>13} {value:7.2f}" for key, value in row.items()))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rates", type=float, nargs="*", default=[4.0, 8.0])
    parser.add_argument("--idle", type=int, nargs="*", default=[1024, 4096, 8192, 15000, 32768])
    parser.add_argument("--input", type=int, default=4096)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--disturb", action="store_true", help="ITL of running answers while handoffs arrive")
    parser.add_argument("--streams", type=int, default=32, help="answers that run, with --disturb")
    parser.add_argument("--disturb-seconds", type=float, default=15.0, help="of each of its phases")
    parser.add_argument("--prefill-tokens", type=int, default=8192, help="at most, in a prefill step")
    parser.add_argument("--model", type=Path, help="a folder with another config.json")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--max-model-len", type=int, default=MAX_MODEL_LEN)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with ExitStack() as stack:
        folder = args.model or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.model is None:
            (folder / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
        settings = PairSettings(folder, args.max_model_len, args.device, args.prefill_tokens)
        address = stack.enter_context(running_pair(settings))
        found = uvloop.run(measure(args, address, settings.vocab_size))
    if args.json:
        print(json.dumps(found))
    elif not args.disturb:  # which prints as it goes
        print_rows(found, args.input)


if __name__ == "__main__":
    main()
