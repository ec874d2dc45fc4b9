"""A node as a process of its own: ready file, signals, exit status, readable errors."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from kvrelay.core.ids import AttemptId
from kvrelay.core.node_messages import (
    AttemptFailed,
    DrainStarted,
    KVReleased,
    ReleaseKV,
    Reserved,
    ReserveDecode,
    Role,
    StartDrain,
    StartPrefill,
)
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams

if TYPE_CHECKING:
    from tests.nodes.shell.conftest import FakeRouter, Workshop

PROGRAM = """
import json, sys
from kvrelay.core.node_messages import Role
from kvrelay.decode_node.main import run_decode_node
from kvrelay.engine.config import EngineConfig, EngineKind
from kvrelay.kv_transfer.config import KVTransferConfig
from kvrelay.node.config import NodeConfig
from kvrelay.prefill_node.main import run_prefill_node

settings = json.loads(sys.argv[1])
if settings["is_broken"]:
    from kvrelay.engine.sim.engine import SimEngine

    def broken_step(self):
        raise RuntimeError("broken kernel")

    def submit_and_break(self, request, key):
        submit_prefill(self, request, key)
        SimEngine.step = broken_step  # after the warm-up, at the first attempt

    submit_prefill, SimEngine.submit_prefill = SimEngine.submit_prefill, submit_and_break
role = Role(settings["role"])
config = NodeConfig(
    role,
    EngineConfig(settings["model"], EngineKind(settings["engine"]), num_blocks=64),
    routers=(settings["router"],),
    transfer=KVTransferConfig(transport="tcp", listen_port=settings["port"]),
    ready_file=settings["ready_file"],
    drain_timeout_s=settings["drain_timeout_s"],
)
sys.exit(run_prefill_node(config) if role is Role.PREFILL else run_decode_node(config))
"""
REQUEST = TokenRequest(tuple(range(1, 30)), 29, SamplingParams())


@dataclass
class NodeProcess:
    process: asyncio.subprocess.Process
    ready_file: Path

    async def exit_status(self) -> int:
        async with asyncio.timeout(60):
            return await self.process.wait()

    async def stderr(self) -> str:
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()

    async def node_id(self, router: FakeRouter) -> str:
        """Its id, once it is attached."""
        await router.until(lambda: any(not node.is_gone for node in router.nodes.values()))
        return next(node_id for node_id, node in router.nodes.items() if not node.is_gone)


class Launcher:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.started: list[NodeProcess] = []

    async def start(self, router: str, **settings: object) -> NodeProcess:
        ready_file = self._folder / f"ready{len(self.started)}.json"
        defaults: dict[str, object] = {
            "role": "decode",
            "engine": "sim",
            "model": "sim",
            "router": router,
            "port": 0,
            "ready_file": str(ready_file),
            "drain_timeout_s": 30.0,
            "is_broken": False,
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            PROGRAM,
            json.dumps({**defaults, **settings}),
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started = NodeProcess(process, ready_file)
        self.started.append(started)
        return started


@pytest_asyncio.fixture
async def launcher(tmp_path: Path) -> AsyncIterator[Launcher]:
    made = Launcher(tmp_path)
    yield made
    for node in made.started:
        if node.process.returncode is None:
            node.process.kill()
        await node.process.communicate()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_an_idle_node_writes_its_ready_file_and_leaves_at_once_on_sigterm(
    workshop: Workshop, launcher: Launcher, role: str
) -> None:
    router = await workshop.router()
    started = await launcher.start(router.address, role=role)
    node = router.nodes[await started.node_id(router)]
    await router.until(lambda: node.num_frames >= 2)  # a heartbeat after it was attached
    started.process.send_signal(signal.SIGTERM)
    await router.until(lambda: node.is_gone)
    assert await started.exit_status() == 0
    ready = json.loads(started.ready_file.read_text())
    assert ready["role"] == role
    assert ready["pid"] == started.process.pid
    assert ready["node_id"] == node.description.node_id
    assert ready["transfer_address"].startswith("127.0.0.1:")
    assert node.has(DrainStarted)
    assert "Traceback" not in await started.stderr()


async def test_a_draining_node_waits_for_what_it_holds(workshop: Workshop, launcher: Launcher) -> None:
    router = await workshop.router()
    started = await launcher.start(router.address)
    node = router.nodes[await started.node_id(router)]
    node.send(ReserveDecode(AttemptId(1), REQUEST))
    await router.until(lambda: node.has(Reserved, 1))
    started.process.send_signal(signal.SIGTERM)
    await router.until(lambda: node.has(DrainStarted))
    assert started.process.returncode is None
    node.send(ReleaseKV(AttemptId(1)))
    assert await started.exit_status() == 0
    assert node.terminals(1) == [KVReleased(AttemptId(1))]


async def test_a_node_that_a_router_tells_to_leave_drains_as_on_sigterm(
    workshop: Workshop, launcher: Launcher
) -> None:
    router = await workshop.router()
    started = await launcher.start(router.address)
    node = router.nodes[await started.node_id(router)]
    node.send(ReserveDecode(AttemptId(1), REQUEST))
    await router.until(lambda: node.has(Reserved, 1))
    node.send(StartDrain())
    await router.until(lambda: node.has(DrainStarted))
    node.send(StartDrain())  # said twice, as by two routers, it is no second signal
    node.send(ReleaseKV(AttemptId(1)))
    assert await started.exit_status() == 0
    assert node.terminals(1) == [KVReleased(AttemptId(1))]


async def test_a_signal_to_a_node_that_a_router_told_to_leave_ends_it_at_once(
    workshop: Workshop, launcher: Launcher
) -> None:
    router = await workshop.router()
    started = await launcher.start(router.address)
    node = router.nodes[await started.node_id(router)]
    node.send(ReserveDecode(AttemptId(1), REQUEST))
    await router.until(lambda: node.has(Reserved, 1))
    node.send(StartDrain())
    await router.until(lambda: node.has(DrainStarted))
    started.process.send_signal(signal.SIGTERM)
    assert await started.exit_status() == 1


async def test_a_second_signal_leaves_at_once(workshop: Workshop, launcher: Launcher) -> None:
    router = await workshop.router()
    started = await launcher.start(router.address)
    node = router.nodes[await started.node_id(router)]
    node.send(ReserveDecode(AttemptId(1), REQUEST))
    await router.until(lambda: node.has(Reserved, 1))
    started.process.send_signal(signal.SIGTERM)
    await router.until(lambda: node.has(DrainStarted))
    started.process.send_signal(signal.SIGINT)
    assert await started.exit_status() == 1
    assert "leaving at once" in await started.stderr()
    assert not node.terminals(1)


async def test_drain_time_out_hands_back_and_leaves_cleanly(workshop: Workshop, launcher: Launcher) -> None:
    router = await workshop.router()
    started = await launcher.start(router.address, drain_timeout_s=0.2)
    node = router.nodes[await started.node_id(router)]
    node.send(ReserveDecode(AttemptId(1), REQUEST))
    await router.until(lambda: node.has(Reserved, 1))
    started.process.send_signal(signal.SIGTERM)
    assert await started.exit_status() == 0
    await router.until(lambda: node.is_gone)
    [report] = node.terminals(1)
    assert isinstance(report, AttemptFailed)
    assert report.code == "NODE_UNAVAILABLE"


async def test_an_engine_that_raises_ends_the_process_after_its_attempts_are_failed(
    workshop: Workshop, launcher: Launcher
) -> None:
    router = await workshop.router()
    receiver = await workshop.node(Role.DECODE, ["127.0.0.1:1"])
    started = await launcher.start(router.address, role="prefill", is_broken=True)
    node = router.nodes[await started.node_id(router)]
    node.send(StartPrefill(AttemptId(1), REQUEST, receiver.transfer_address))
    assert await started.exit_status() == 1
    await router.until(lambda: node.is_gone)
    [report] = node.terminals(1)
    assert isinstance(report, AttemptFailed)
    assert report.code == "ENGINE_FAILED"
    assert "kvrelay prefill: the engine raised RuntimeError: broken kernel" in await started.stderr()


async def test_a_model_that_is_not_there_is_one_readable_line(launcher: Launcher, tmp_path: Path) -> None:
    started = await launcher.start("127.0.0.1:1", engine="torch", model=str(tmp_path / "nowhere"))
    assert await started.exit_status() == 2
    text = await started.stderr()
    assert "kvrelay decode: " in text
    assert "nowhere" in text
    assert "Traceback" not in text


async def test_a_port_that_is_taken_is_one_readable_line(launcher: Launcher) -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    started = await launcher.start("127.0.0.1:1", port=port)
    assert await started.exit_status() == 2
    server.close()
    await server.wait_closed()
    text = await started.stderr()
    assert f"kvrelay decode: can't listen on 127.0.0.1:{port}" in text
    assert "Traceback" not in text
