"""One prefill and one decode node on two GPUs of one host, with a router: what a handoff costs, and what
arrives in time under load.

    python -m benchmarks.cluster_gpu [--json] [--rates 4 8] [--input 4096] [--output 256] [--seconds 40]
        [--idle 1024 4096 8192 15000 32768] [--model FOLDER]

The shape is Llama-3.1-8B's with random weights in bfloat16. Idle, one request at a time: the time to the
first token (TTFT), and the handoff cost: second token minus first token, less one decode step (the median of
the later gaps). Under load requests arrive by a Poisson process, prompts are random tokens, no two alike;
per rate the percentiles of TTFT and of all gaps between tokens (ITL), and goodput: the share of requests
with TTFT of at most 500 ms and their own p99 ITL of at most 25 ms. Times are the client library's, in
milliseconds, in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.engine_gpu import LLAMA_3_1_8B
from benchmarks.local_cluster import running_service
from benchmarks.percentiles import percentile
from kvrelay.client import AsyncClient, SamplingParams

TTFT_LIMIT_MS, ITL_LIMIT_MS = 500.0, 25.0
VOCAB = 100_000
MAX_MODEL_LEN = 33_024
NODE_FLAGS = (
    "--device=cuda",
    "--dtype=bfloat16",
    "--random-weights",
    f"--max-model-len={MAX_MODEL_LEN}",
    f"--kv-bytes={40 << 30}",
    "--max-num-seqs=256",
    "--transport=ucx",
    f"--slot-bytes={64 << 20}",
    "--num-send-slots=8",
    "--num-receive-slots=8",
    "--slots-per-transfer=8",
    "--log-level=warning",
)


class Request:
    """One request's arrivals, in seconds of this process's clock."""

    def __init__(self) -> None:
        self.began_s = time.perf_counter()
        self.arrivals_s: list[float] = []
        self.error = ""

    async def run(self, client: AsyncClient, num_input: int, num_output: int) -> None:
        """Ask, and note when each token comes."""
        prompt = [random.randrange(10, VOCAB) for _ in range(num_input)]
        sampling = SamplingParams(max_tokens=num_output, ignore_eos=True)
        self.began_s = time.perf_counter()
        try:
            stream = client.generate(prompt, sampling=sampling, timeout_s=120)
            await stream.each(lambda chunk: self._note(len(chunk.token_ids)))
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"

    def _note(self, num_tokens: int) -> None:
        self.arrivals_s += [time.perf_counter()] * num_tokens

    @property
    def ttft_ms(self) -> float:
        return (self.arrivals_s[0] - self.began_s) * 1e3

    @property
    def gaps_ms(self) -> list[float]:
        pairs = zip(self.arrivals_s, self.arrivals_s[1:], strict=False)
        return [(after - before) * 1e3 for before, after in pairs]


async def measure_idle(client: AsyncClient, num_input: int, repeats: int = 6) -> dict[str, float]:
    """Medians of requests that come one after the other; the first does not count."""
    done = []
    for _ in range(repeats + 1):
        request = Request()
        await request.run(client, num_input, 32)
        check([request])
        done.append(request)
    rows = [(request.ttft_ms, request.gaps_ms[0], statistics.median(request.gaps_ms[2:])) for request in done]
    ttft, second, step = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    worst = max(second - step for _, second, step in rows[1:])
    return {"ttft": ttft, "second": second, "step": step, "handoff": second - step, "handoff max": worst}


async def measure_load(
    client: AsyncClient, num_input: int, num_output: int, rate: float, seconds: float
) -> dict[str, float]:
    """Poisson arrivals for so long; waits for the last answer."""
    arrivals = random.Random(11)
    requests, tasks = [], []
    end_s = time.perf_counter() + seconds
    next_s = time.perf_counter()
    while next_s < end_s:
        await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
        request = Request()
        requests.append(request)
        tasks.append(asyncio.create_task(request.run(client, num_input, num_output)))
        next_s += arrivals.expovariate(rate)
    await asyncio.gather(*tasks)
    check(requests)
    gaps = [gap for request in requests for gap in request.gaps_ms]
    good = sum(
        request.ttft_ms <= TTFT_LIMIT_MS and percentile(request.gaps_ms, 99) <= ITL_LIMIT_MS
        for request in requests
    )
    second = [request.gaps_ms[0] for request in requests]
    return {
        "requests": len(requests),
        "ttft p50": percentile([request.ttft_ms for request in requests], 50),
        "ttft p99": percentile([request.ttft_ms for request in requests], 99),
        "itl p50": percentile(gaps, 50),
        "itl p99": percentile(gaps, 99),
        "second p50": percentile(second, 50),
        "second p99": percentile(second, 99),
        "goodput": good / len(requests),
    }


def check(requests: list[Request]) -> None:
    """A failed request ends the benchmark: its figures would flatter."""
    failed = [request.error for request in requests if request.error or not request.arrivals_s]
    if failed:
        sys.exit(f"{len(failed)} of {len(requests)} requests failed: {failed[0]}")


async def run(args: argparse.Namespace, address: str) -> dict[str, Any]:
    found: dict[str, Any] = {"idle": {}, "load": {}}
    async with AsyncClient(address) as client:
        await measure_idle(client, 512)
        for num_input in args.idle:
            found["idle"][num_input] = await measure_idle(client, num_input)
        for rate in args.rates:
            await measure_load(client, args.input, args.output, rate, 3.0)
            found["load"][rate] = await measure_load(client, args.input, args.output, rate, args.seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rates", type=float, nargs="*", default=[4.0, 8.0])
    parser.add_argument("--idle", type=int, nargs="*", default=[1024, 4096, 8192, 15000, 32768])
    parser.add_argument("--input", type=int, default=4096)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--prefill-tokens", type=int, default=8192, help="at most, in a prefill step")
    parser.add_argument("--model", type=Path, help="a folder with another config.json")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = args.model or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.model is None:
            (folder / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
        router = stack.enter_context(running_service("router", ["--port=0", "--http-port=0"]))
        address = router.ready["grpc_address"]
        for role, gpus, tokens in (("prefill", "0,1", args.prefill_tokens), ("decode", "1,0", 2048)):
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus  # its own first; UCX needs to see the other one too
            flags = [f"--router={address}", f"--model={folder}", f"--max-num-batched-tokens={tokens}"]
            stack.enter_context(running_service(role, [*flags, *NODE_FLAGS]))
        found = uvloop.run(run(args, address))
    if args.json:
        print(json.dumps(found))
        return
    for kind, rows in found.items():
        for what, row in rows.items():
            name = f"{what} tokens, idle" if kind == "idle" else f"{what:g}/s of {args.input}"
            print(f"{name:20}" + "".join(f"{key:>13} {value:7.2f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
