"""What the router costs per streamed token: many paced streams on one `Session`, CPU of its process.

Three rows of one run: a bare grpc.aio relay (the floor: frames in, messages out, no ledger), the router with
the same fake nodes, and the router with real `sim` nodes. TTFT is that of an idle cluster.

    python -m benchmarks.router_session [--json] [--streams 256] [--step-ms 20] [--seconds 8]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import uvloop

from benchmarks.fake_nodes import CHANNEL_OPTIONS, END
from benchmarks.local_cluster import LocalService, running_service, wait_for_file
from kvrelay.codec.client_api import (
    SessionUpdateDecoder,
    decode_cluster_state,
    encode_generate,
    encode_session_ask,
    encode_watch_cluster,
)
from kvrelay.core.client_types import GenerateCall, SessionAsk
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.v1 import router_pb2_grpc

MAX_TOKENS = 1 << 16
ROUTER_FLAGS = [
    "--host=127.0.0.1",
    "--port=0",
    "--http-port=0",
    "--log-level=warning",
    "--max-prefill-requests-per-node=4096",
    "--max-prefill-tokens-per-node=1073741824",
]


def _call(prompt_tokens: int, max_tokens: int) -> GenerateCall:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return GenerateCall("", "", TokenRequest(tuple(range(1, prompt_tokens + 1)), prompt_tokens, sampling))


async def _ttft_s(stub: Any, num_requests: int) -> list[float]:
    """Of requests of few tokens, one after the other."""
    measured = []
    for _ in range(num_requests):
        began_s = time.perf_counter()
        call = stub.Generate(encode_generate(_call(128, 2)))
        is_first = True
        while (response := await call.read()) is not END:
            if is_first and response.WhichOneof("kind") == "tokens":
                measured.append(time.perf_counter() - began_s)
                is_first = False
    return measured


def _cpu_s(process: psutil.Process) -> float:
    """CPU seconds of all threads, from the scheduler's own nanosecond count."""
    threads = Path(f"/proc/{process.pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


async def _stream(stub: Any, args: argparse.Namespace, router: psutil.Process) -> dict[str, float]:
    session = stub.Session()
    calls = tuple((number, _call(args.prompt_tokens, MAX_TOKENS)) for number in range(args.streams))
    await session.write(encode_session_ask(SessionAsk(calls)))
    tokens_seen: dict[int, int] = {}
    decode = SessionUpdateDecoder().decode
    while len(tokens_seen) < args.streams or min(tokens_seen.values()) < 3:  # until all decode
        update = decode(await session.read())
        assert not update.failed, update.failed
        for stream_id in update.stream_ids:
            tokens_seen[stream_id] = tokens_seen.get(stream_id, 0) + 1
    num_tokens = num_messages = 0
    before_s, began_s = _cpu_s(router), time.perf_counter()
    while (now_s := time.perf_counter()) - began_s < args.seconds:
        num_tokens += len((await session.read()).token_ids)
        num_messages += 1
    cpu_s = _cpu_s(router) - before_s
    session.cancel()
    return {
        "router_cpu_us_per_token": cpu_s / num_tokens * 1e6,
        "tokens_per_s": num_tokens / (now_s - began_s),
        "tokens_per_message": num_tokens / num_messages,
        "router_cpu_percent": 100 * cpu_s / (now_s - began_s),
    }


async def _measure(address: str, args: argparse.Namespace, service: LocalService) -> dict[str, float]:
    """A bare relay answers no `Generate`, so it has no TTFT."""
    router = psutil.Process(service.pid)
    options = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub = router_pb2_grpc.RouterStub(channel)  # type: ignore[no-untyped-call]
        await _wait_for_nodes(stub, args.decode_nodes + 1)
        ttft_s = (await _ttft_s(stub, 120))[20:] if service.role == "router" else []
        figures = await _stream(stub, args, router)
    if ttft_s:
        figures["ttft_p50_ms"] = statistics.median(ttft_s) * 1e3
    return {**figures, "router_rss_mb": router.memory_info().rss / 1e6}


async def _wait_for_nodes(stub: Any, number: int) -> None:
    watch = stub.WatchCluster(encode_watch_cluster(0.1))
    while len(decode_cluster_state(await watch.read()).nodes) < number:
        pass
    watch.cancel()


@contextmanager
def _fake_nodes(address: str, args: argparse.Namespace, *, full_rows: bool) -> Iterator[None]:
    command = [sys.executable, "-m", "benchmarks.fake_nodes", address, "--step-ms", str(args.step_ms)]
    command += ["--decode-nodes", str(args.decode_nodes), *(["--full-rows"] if full_rows else [])]
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def _bare_relay() -> Iterator[LocalService]:
    with tempfile.TemporaryDirectory() as folder:
        ready_file = Path(folder) / "ready.json"
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.bare_relay", str(ready_file)])
        try:
            wait_for_file(ready_file, process, ready_file)
            yield LocalService("relay", process.pid, json.loads(ready_file.read_text()))
        finally:
            process.kill()
            process.wait()


def _run(args: argparse.Namespace, which: str) -> dict[str, float]:
    with ExitStack() as stack:
        if which == "bare relay":
            router = stack.enter_context(_bare_relay())
        else:
            router = stack.enter_context(running_service("router", ROUTER_FLAGS))
        address = router.ready["grpc_address"]
        if which == "router, sim nodes":
            for role, count in (("prefill", 1), ("decode", args.decode_nodes)):
                for _ in range(count):
                    stack.enter_context(running_service(role, _sim_flags(address, args)))
        else:
            stack.enter_context(_fake_nodes(address, args, full_rows=which == "bare relay"))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_measure(address, args, router))


def _sim_flags(address: str, args: argparse.Namespace) -> list[str]:
    return [
        f"--router={address}",
        "--model=sim",
        "--log-level=warning",
        f"--num-blocks={args.streams * 128}",
        f"--max-num-seqs={args.streams}",
        "--max-num-batched-tokens=4096",
        f"--max-waiting={4 * args.streams}",
        "--sim-prefill-base-s=0",
        "--sim-prefill-token-s=0",
        f"--sim-decode-base-s={args.step_ms / 1e3}",
        "--sim-decode-seq-s=0",
    ]


ROWS = ("bare relay", "router, fake nodes", "router, sim nodes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--decode-nodes", type=int, default=1)
    parser.add_argument("--step-ms", type=float, default=20.0, help="a decode step; 0 is unpaced")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    figures = {which: _run(args, which) for which in ROWS}
    if args.json:
        print(json.dumps(figures))
        return
    print(f"{args.streams} streams on one Session, a decode step of {args.step_ms:g} ms")
    names = list(dict.fromkeys(name for row in figures.values() for name in row))
    print(f"{'':26}" + "".join(f"{which:>22}" for which in ROWS))
    for name in names:
        cells = (figures[which].get(name) for which in ROWS)
        print(f"{name:26}" + "".join(f"{'–' if cell is None else f'{cell:.2f}':>22}" for cell in cells))


if __name__ == "__main__":
    main()
