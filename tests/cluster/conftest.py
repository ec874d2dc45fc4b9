"""Clusters of real processes: one router and any number of nodes, started as a user would start them.

Every test's cluster is checked for leaks when it ends: no request, attempt, transfer or held block is left
anywhere, and each pool's blocks add up.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvrelay.client import AsyncClient
from kvrelay.core.cluster_view import ClusterState
from kvrelay.core.request import TokenRequest
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.factory import load_engine
from kvrelay.engine.interface import SequenceKey

REPOSITORY = Path(__file__).parents[2]
CLI = "kvrelay.cli"
START_TIMEOUT_S = 120.0
SETTLE_TIMEOUT_S = 60.0


@dataclass
class ServiceProcess:
    """One `kvrelay` service, its log and what its ready file says."""

    name: str
    popen: subprocess.Popen[bytes]
    ready_file: Path
    log_file: Path
    ready: dict[str, Any] = field(default_factory=dict)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.ready_file.exists():
            if self.popen.poll() is not None:
                raise AssertionError(f"{self.name} exited {self.popen.returncode}:\n{self.log()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name} is not ready after {START_TIMEOUT_S} s:\n{self.log()}")
            time.sleep(0.02)
        self.ready = json.loads(self.ready_file.read_text())

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")[-4000:]

    def kill(self) -> None:
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait(10)

    def stop(self) -> None:
        """SIGTERM, and after a while SIGKILL."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
            try:
                self.popen.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


@dataclass
class Cluster:
    """A running cluster. `nodes` maps node id to its process."""

    router: ServiceProcess
    nodes: dict[str, ServiceProcess]
    folder: Path

    @property
    def address(self) -> str:
        return str(self.router.ready["grpc_address"])

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncClient]:
        async with AsyncClient([self.address]) as client:
            yield client

    async def wait_for_state(
        self, what: str, condition: Any, timeout_s: float = SETTLE_TIMEOUT_S
    ) -> ClusterState:
        """The first watched state for which `condition(state)` holds."""
        state: ClusterState | None = None
        try:
            async with asyncio.timeout(timeout_s), self.client() as client:
                async for state in client.watch_cluster(interval_s=0.1):
                    if condition(state):
                        return state
        except TimeoutError:
            raise AssertionError(f"not seen within {timeout_s} s: {what}; last state: {state}") from None
        raise AssertionError(f"the watch ended before: {what}")

    async def wait_idle(self) -> ClusterState:
        """Wait until nothing is held anywhere; fails naming what is."""
        return await self.wait_for_state("every node holds nothing", is_idle)


def is_idle(state: ClusterState) -> bool:
    """Whether that router's books are empty and its nodes hold nothing."""
    if any(state.num_requests.values()):
        return False
    for node in state.nodes:
        load = node.load
        if load is None or node.num_attempts or load.num_attempts or load.num_open_transfers:
            return False
        if load.num_held_blocks or load.num_reserved or load.num_running or load.num_waiting:
            return False
        assert load.num_held_blocks + load.num_cached_blocks + load.num_empty_blocks == node.num_blocks
    return True


def _spawn(folder: Path, name: str, args: Sequence[str], module: str = CLI) -> ServiceProcess:
    ready_file, log_file = folder / f"{name}.ready.json", folder / f"{name}.log"
    ready_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", module, *args, "--ready-file", str(ready_file)]
    with log_file.open("ab") as log:
        popen = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    return ServiceProcess(name, popen, ready_file, log_file)


class ClusterStarter:
    """Starts clusters and remembers them, so that none outlives its test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clusters: list[Cluster] = []
        self.routers: list[ServiceProcess] = []

    def start(
        self,
        num_prefill: int,
        num_decode: int,
        node_args: Sequence[str],
        *,
        prefill_args: Sequence[str] = (),
        decode_args: Sequence[str] = (),
        router_args: Sequence[str] = (),
        router_module: str = CLI,
    ) -> Cluster:
        folder = self.folder / f"cluster{len(self.clusters)}"
        folder.mkdir()
        router = self.spawn_router(folder, ["--port", "0", *router_args], module=router_module)
        cluster = Cluster(router, {}, folder)
        self.clusters.append(cluster)
        for index in range(num_prefill):
            self.add_node(cluster, "prefill", f"p{index}", [*node_args, *prefill_args])
        for index in range(num_decode):
            self.add_node(cluster, "decode", f"d{index}", [*node_args, *decode_args])
        for node in cluster.nodes.values():
            node.wait_ready()
        return cluster

    def spawn_router(
        self, folder: Path, args: Sequence[str], name: str = "router", module: str = CLI
    ) -> ServiceProcess:
        """A router that is ready."""
        router = _spawn(folder, name, ["router", "--host", "127.0.0.1", "--http-port", "0", *args], module)
        self.routers.append(router)
        router.wait_ready()
        return router

    def add_node(self, cluster: Cluster, role: str, name: str, args: Sequence[str]) -> ServiceProcess:
        node = _spawn(cluster.folder, name, [role, "--router", cluster.address, "--node-id", name, *args])
        cluster.nodes[name] = node
        return node

    def stop(self) -> None:
        nodes = [node for cluster in self.clusters for node in cluster.nodes.values()]
        for process in [*nodes, *self.routers]:
            process.stop()


@contextmanager
def _starter(folder: Path) -> Iterator[ClusterStarter]:
    starter = ClusterStarter(folder)
    try:
        yield starter
    finally:
        starter.stop()


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[ClusterStarter]:
    with _starter(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def module_starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterStarter]:
    with _starter(tmp_path_factory.mktemp("clusters")) as made:
        yield made


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A four-layer Llama with random weights: real attention and real KV, in milliseconds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_alone() -> Callable[[Path, Sequence[TokenRequest]], list[tuple[int, ...]]]:
    """Answer requests with one `torch` engine in this process, all at once."""

    def run(model: Path, requests: Sequence[TokenRequest]) -> list[tuple[int, ...]]:
        engine = load_engine(
            EngineConfig(engine="torch", model=str(model), num_blocks=2048, max_waiting=1024, num_threads=1)
        )
        answers: list[list[int]] = [[] for _ in requests]
        for index, request in enumerate(requests):
            engine.submit(request, SequenceKey(str(index)))
        while engine.has_work():
            done = engine.step()
            assert not done.failures
            for output in done.outputs:
                assert output.index == len(answers[int(output.key)])
                answers[int(output.key)].append(output.token_id)
        assert engine.load().num_held_blocks == 0
        return [tuple(answer) for answer in answers]

    return run
