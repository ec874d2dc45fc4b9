"""Real processes tell their service manager what becomes of them; one whose engine hangs goes silent."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from kvrelay.client import AsyncClient
from kvrelay.core.sampling import SamplingParams

pytestmark = pytest.mark.cluster

PATIENCE_S = 120.0
WATCHDOG_S = 4.0
SIM = ["--model=sim", "--num-blocks=256"]
SLOW_WITH_LONG_PROMPTS = "--sim-decode-context-token-s=0.03"
"""A step of 2,000 tokens takes a minute, the warm-up's of 64 two seconds."""


class Watched:
    """A service whose service manager we are."""

    def __init__(self, stack: ExitStack, folder: Path, name: str, *arguments: str) -> None:
        self.ready_file = folder / f"{name}.ready.json"
        self._listening = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self._listening.bind(str(folder / f"{name}.notify"))
        self._heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        environ = {
            "NOTIFY_SOCKET": str(folder / f"{name}.notify"),
            "WATCHDOG_USEC": str(round(WATCHDOG_S * 1e6)),
        }
        log = stack.enter_context((folder / f"{name}.log").open("wb"))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvrelay.cli", *arguments, "--ready-file", str(self.ready_file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        )
        stack.callback(self._end)

    def _listen(self) -> None:
        """Takes all at once, as a service manager does: few datagrams fit into a socket."""
        with suppress(OSError):  # the socket is closed in the end
            while text := self._listening.recv(4096).decode():
                self._heard.put(text)

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()

    def hear(self, line: str) -> str:
        """The next datagram that has such a line."""
        while True:
            text = self._heard.get(timeout=PATIENCE_S)
            if line in text.splitlines():
                return text

    def is_silent_for(self, seconds: float) -> bool:
        """Whether nothing comes within that time."""
        try:
            self._heard.get(timeout=seconds)
        except queue.Empty:
            return True
        return False


Start = Callable[..., Watched]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:
        yield lambda name, *arguments: Watched(stack, tmp_path, name, *arguments)


def _start_router(start: Start) -> tuple[Watched, str]:
    router = start("router", "router", "--host", "127.0.0.1", "--port", "0", "--http-port", "0")
    router.hear("READY=1")
    return router, str(json.loads(router.ready_file.read_text())["grpc_address"])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_service_is_ready_alive_and_then_on_its_way_out(start: Start, num_workers: int) -> None:
    router, address = _start_router(start)
    proxy_flags = ("--host", "127.0.0.1", "--port", "0", "--workers", str(num_workers))
    proxy = start("proxy", "proxy", "--router", address, *proxy_flags)
    assert "EXTEND_TIMEOUT_USEC=" in proxy.hear(f"STATUS=routers: {address}"), "there is no model yet"
    nodes = [start(role, role, "--router", address, *SIM) for role in ("prefill", "decode")]
    for service in (*nodes, proxy, router):
        if service is not router:
            service.hear("READY=1")
        service.hear("WATCHDOG=1")
    for service in (proxy, *nodes, router):
        service.process.send_signal(signal.SIGTERM)
        assert "EXTEND_TIMEOUT_USEC=" in service.hear("STOPPING=1")
        assert service.process.wait(PATIENCE_S) == 0


def test_a_node_that_finds_no_router_asks_for_time_and_can_be_stopped(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
    node = start("decode", "decode", "--router", address, *SIM)
    assert "EXTEND_TIMEOUT_USEC=" in node.hear(f"STATUS=waiting for a router: {address}")
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(PATIENCE_S) == 0


async def test_a_node_whose_engine_hangs_is_no_longer_alive_though_its_loop_is(start: Start) -> None:
    _, address = await asyncio.to_thread(_start_router, start)
    prefill = start("prefill", "prefill", "--router", address, *SIM)
    decode = start("decode", "decode", "--router", address, *SIM, SLOW_WITH_LONG_PROMPTS)
    for node in (prefill, decode):
        await asyncio.to_thread(node.hear, "READY=1")
    async with AsyncClient([address]) as client:
        asking = asyncio.create_task(
            client.complete([7] * 2000, sampling=SamplingParams(max_tokens=50, ignore_eos=True))
        )
        async for state in client.watch_cluster(interval_s=0.1):
            if state.num_requests.get("decoding"):
                break
        # Pets of before the step's first half of WATCHDOG_S may be on their way; then there are none.
        while not await asyncio.to_thread(decode.is_silent_for, WATCHDOG_S):
            assert not asking.done(), "the step should have hung"
        state = await client.cluster_state()
        assert len(state.nodes) == 2, "its router still hears it"
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
