"""What the router costs per streamed token: one `Session`, many paced streams, fake nodes in a process of
their own. CPU time is the router process's alone.

    python -m benchmarks.router_session --streams 256 --step-ms 20 --seconds 8 --json
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
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import psutil
import uvloop

from kvrelay.codec.client_api import encode_generate, encode_session_ask
from kvrelay.codec.cluster import decode_router_frame, encode_hello, encode_node_frame
from kvrelay.core.client_types import GenerateCall, SessionAsk
from kvrelay.core.ids import AttemptId, NodeId
from kvrelay.core.kv import KVFingerprint
from kvrelay.core.node_messages import (
    AttemptFinished,
    HandoffVerified,
    KVReleased,
    NodeDescription,
    NodeFrame,
    PrefillFinished,
    ReleaseKV,
    Report,
    Reserved,
    ReserveDecode,
    Role,
    StartPrefill,
    TokenBatch,
)
from kvrelay.core.request import FinishReason, TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.v1 import cluster_pb2_grpc, router_pb2_grpc

_END = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in the stubs
_CHANNEL_OPTIONS = (("grpc.max_receive_message_length", 64 << 20),)


# ---- the fake nodes' process ------------------------------------------------------------------------


class FakeNodes:
    """One prefill and some decode nodes whose engines take no time but the paced step's."""

    def __init__(self, address: str, num_decode: int, step_s: float) -> None:
        self._address = address
        self._num_decode = num_decode
        self._step_s = step_s
        self._prefilled: set[int] = set()
        self._reserved: dict[int, tuple[Any, TokenRequest]] = {}
        self._running: dict[Any, dict[int, list[int]]] = {}
        self._frames: dict[Any, asyncio.Queue[NodeFrame]] = {}

    async def run(self) -> None:
        stub = cluster_pb2_grpc.ClusterStub(  # type: ignore[no-untyped-call]
            grpc.aio.insecure_channel(self._address, options=_CHANNEL_OPTIONS)
        )
        nodes = [(Role.PREFILL, "p0")] + [(Role.DECODE, f"d{i}") for i in range(self._num_decode)]
        async with asyncio.TaskGroup() as group:
            for role, name in nodes:
                call = stub.Attach()
                await call.write(encode_hello(_describe(name, role)))
                await call.read()
                self._frames[call] = asyncio.Queue(maxsize=1024)
                group.create_task(self._write(call))
                group.create_task(self._read(call))
                group.create_task(self._beat(call))
                if role is Role.DECODE:
                    self._running[call] = {}
                    group.create_task(self._decode(call))

    async def _write(self, call: Any) -> None:
        while True:
            await call.write(encode_node_frame(await self._frames[call].get()))

    async def _send(self, call: Any, frame: NodeFrame) -> None:
        await self._frames[call].put(frame)

    async def _read(self, call: Any) -> None:
        while (received := await call.read()) is not _END:
            for command in decode_router_frame(received).commands:
                await self._obey(call, command)

    async def _obey(self, call: Any, command: StartPrefill | ReserveDecode | ReleaseKV) -> None:
        attempt = command.attempt
        if isinstance(command, StartPrefill):
            batch = TokenBatch([attempt], [command.request.num_output_tokens], [1], [7])
            reports: tuple[Report, ...] = (PrefillFinished(attempt, 0, 0.0, 0.0), KVReleased(attempt))
            await self._send(call, NodeFrame(batch, reports))
            self._prefilled.add(attempt)
        elif isinstance(command, ReserveDecode):
            self._reserved[attempt] = (call, command.request)
            await self._send(call, NodeFrame(reports=(Reserved(attempt, 0),)))
        else:
            self._running.get(call, {}).pop(attempt, None)
            await self._send(call, NodeFrame(reports=(KVReleased(attempt),)))
        self._hand_off()

    def _hand_off(self) -> None:
        for attempt in self._prefilled & self._reserved.keys():
            self._prefilled.discard(attempt)
            call, request = self._reserved.pop(attempt)
            self._running[call][attempt] = [request.num_output_tokens + 1, request.sampling.max_tokens]

    async def _beat(self, call: Any) -> None:
        while True:
            await asyncio.sleep(1.0)
            await self._send(call, NodeFrame())

    async def _decode(self, call: Any) -> None:
        running, verified = self._running[call], set[int]()
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + self._step_s, time.monotonic() - self._step_s)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            if not running:
                continue
            fresh = running.keys() - verified
            verified |= fresh
            reports: list[Report] = [
                HandoffVerified(AttemptId(attempt), 1, 1, 0.0, "fake") for attempt in fresh
            ]
            attempts = list(running)
            indices = [state[0] for state in running.values()]
            for attempt in attempts:
                state = running[attempt]
                state[0] += 1
                if state[0] >= state[1]:
                    del running[attempt]
                    verified.discard(attempt)
                    reports.append(AttemptFinished(AttemptId(attempt), FinishReason.LENGTH))
            batch = TokenBatch(attempts, indices, [1] * len(attempts), [7] * len(attempts))
            await self._send(call, NodeFrame(batch, tuple(reports)))


def _describe(name: str, role: Role) -> NodeDescription:
    return NodeDescription(
        node_id=NodeId(name),
        incarnation=1,
        role=role,
        model="m",
        engine="fake",
        fingerprint=KVFingerprint("m", "float32", 1, 1, 1, ""),
        vocab_size=50_000,
        max_model_len=1 << 20,
        num_blocks=1 << 20,
        block_size=16,
        max_num_seqs=1024,
        transfer_address="127.0.0.1:9" if role is Role.DECODE else "",
    )


# ---- the client and what it measures ----------------------------------------------------------------


def _call(prompt_tokens: int, max_tokens: int) -> GenerateCall:
    request = TokenRequest(
        tuple(range(1, prompt_tokens + 1)), prompt_tokens, SamplingParams(max_tokens=max_tokens)
    )
    return GenerateCall("", "m", request)


async def _ttft_s(stub: Any, num_requests: int) -> list[float]:
    """Of single-token requests on an idle cluster whose prefill takes no time: what the router adds."""
    measured = []
    for _ in range(num_requests):
        began_s = time.perf_counter()
        call = stub.Generate(encode_generate(_call(128, 1)))
        while (response := await call.read()) is not _END:
            if response.WhichOneof("kind") == "tokens":
                measured.append(time.perf_counter() - began_s)
    return measured


async def _stream(stub: Any, args: argparse.Namespace, router: psutil.Process) -> dict[str, float]:
    session = stub.Session()
    calls = tuple((number, _call(args.prompt_tokens, 1 << 19)) for number in range(args.streams))
    await session.write(encode_session_ask(SessionAsk(calls)))
    seen: set[int] = set()
    while len(seen) < args.streams:
        seen.update((await session.read()).stream_ids)
    num_tokens = num_messages = 0
    before, began_s = router.cpu_times(), time.perf_counter()
    while (now_s := time.perf_counter()) - began_s < args.seconds:
        num_tokens += len((await session.read()).token_ids)
        num_messages += 1
    after = router.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    session.cancel()
    return {
        "router_cpu_us_per_token": cpu_s / num_tokens * 1e6,
        "tokens_per_s": num_tokens / (now_s - began_s),
        "tokens_per_message": num_tokens / num_messages,
        "router_cpu_share": cpu_s / (now_s - began_s),
    }


async def _measure(address: str, args: argparse.Namespace, pid: int) -> dict[str, float]:
    router = psutil.Process(pid)
    options = (*_CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub = router_pb2_grpc.RouterStub(channel)  # type: ignore[no-untyped-call]
        ttft_s = [] if args.bare else (await _ttft_s(stub, 220))[20:]
        before, began_s = router.cpu_times(), time.perf_counter()
        await asyncio.sleep(args.idle_seconds)
        after = router.cpu_times()
        idle_s = after.user + after.system - before.user - before.system
        figures = await _stream(stub, args, router)
    return {
        **figures,
        "ttft_p50_ms": statistics.median(ttft_s or [0.0]) * 1e3,
        "idle_cpu_share": idle_s / (time.perf_counter() - began_s) if args.idle_seconds else 0.0,
        "router_rss_mb": router.memory_info().rss / 1e6,
    }


_ROUTER = """
import sys
from kvrelay.router.main import run_router
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.server_config import RouterConfig
core = RouterCoreConfig(max_prefill_requests_per_node=4096, max_prefill_tokens_per_node=1 << 30)
sys.exit(run_router(RouterConfig(listen_host="127.0.0.1", grpc_port=0, http_port=0, ready_file=sys.argv[1],
    log_level="warning", core=core, drain_timeout_s=0.0)))
"""


def _wait_ready(ready_file: Path, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    deadline_s = time.monotonic() + 30
    while not ready_file.exists():
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise SystemExit("the router did not start")
        time.sleep(0.02)
    facts: dict[str, Any] = json.loads(ready_file.read_text())
    return facts


async def _wait_for_nodes(address: str, number: int) -> None:
    from kvrelay.codec.client_api import decode_cluster_state, encode_watch_cluster

    async with grpc.aio.insecure_channel(address) as channel:
        watch = router_pb2_grpc.RouterStub(channel).WatchCluster(  # type: ignore[no-untyped-call]
            encode_watch_cluster(0.1)
        )
        while len(decode_cluster_state(await watch.read()).nodes) < number:
            pass
        watch.cancel()


def run(args: argparse.Namespace) -> dict[str, float]:
    """Start router and nodes, measure, stop them."""
    with tempfile.TemporaryDirectory() as folder:
        ready_file = Path(folder) / "ready.json"
        program = [str(Path(__file__).with_name("bare_relay.py"))] if args.bare else ["-c", _ROUTER]
        router = subprocess.Popen([sys.executable, *program, str(ready_file)])
        nodes: subprocess.Popen[bytes] | None = None
        try:
            facts = _wait_ready(ready_file, router)
            address = str(facts["grpc_address"])
            command = [sys.executable, __file__, "--nodes-of", address]
            command += ["--decode-nodes", str(args.decode_nodes), "--step-ms", str(args.step_ms)]
            nodes = subprocess.Popen(command)
            with closing(uvloop.new_event_loop()) as loop:
                loop.run_until_complete(_wait_for_nodes(address, args.decode_nodes + 1))
                return loop.run_until_complete(_measure(address, args, int(facts["pid"])))
        finally:
            for process in (nodes, router):
                if process is not None:
                    process.terminate()
                    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--decode-nodes", type=int, default=1)
    parser.add_argument("--step-ms", type=float, default=20.0, help="a decode step; 0 is unpaced")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--idle-seconds", type=float, default=5.0)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--bare", action="store_true", help="measure a bare grpc.aio relay instead")
    parser.add_argument("--nodes-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.nodes_of:
        uvloop.run(FakeNodes(args.nodes_of, args.decode_nodes, args.step_ms / 1e3).run())
        return
    figures = run(args)
    if args.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:26} {value:12.3f}")


if __name__ == "__main__":
    main()
