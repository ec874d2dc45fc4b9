"""Two routers, two prefill nodes, two decode nodes and a proxy: real processes, with relays between them.

Each process can be killed, stopped and told to drain; each way can be cut, silenced or held. `repair` brings
everything back.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvrelay.client import AsyncClient
from kvrelay.client.config import ClientConfig
from kvrelay.core.cluster_view import ClusterState
from kvrelay.core.errors import KVRelayError, UnknownRequest
from kvrelay.core.explanation import Explanation
from tests.cluster.conftest import is_idle
from tests.cluster.replicas import Replica
from tests.fault_matrix.relay import Relay

ROUTERS: Final = ("router-a", "router-b")
PREFILL: Final = ("p0", "p1")
DECODE: Final = ("d0", "d1")
NODES: Final = (*PREFILL, *DECODE)
PROXY: Final = "proxy"
WAIT_S: Final = 60.0
EXIT_TIMEOUT_S: Final = 90.0
_ROUTER: Final = "tests.fault_matrix.placing_router"
_NODE_HOST: Final = "127.0.0.2"
_RELAY_HOST: Final = "127.0.0.3"
"""Where nodes listen for KV, and what they tell others to dial: the same ports of another address."""
_POLL_S: Final = 0.02
_OBSERVER: Final = ClientConfig(connect_timeout_s=2.0, call_timeout_s=5.0, max_retries=0)


class NotSeen(AssertionError):
    """What was waited for did not come to pass."""


@dataclass
class BreakableCluster:
    """See the module's text. `stopped` are the processes that SIGSTOP has reached."""

    folder: Path
    node_arguments: Sequence[str]
    router_arguments: Sequence[str]
    replicas: dict[str, Replica] = field(default_factory=dict)
    kv: dict[str, tuple[Relay, Relay]] = field(default_factory=dict)
    """Where others send KV to a node: control, data."""
    streams: dict[tuple[str, str], Relay] = field(default_factory=dict)
    """From a node to a router."""
    doors: dict[str, Relay] = field(default_factory=dict)
    """From clients to a router."""
    observers: dict[str, AsyncClient] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)

    # ---- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Returns once both routers have all nodes."""
        for name in ROUTERS:
            await self._start_router(name)
        for name in NODES:
            await self._prepare_node(name)
        arguments = ["proxy", "--host", "127.0.0.1", "--port", "0"]
        for door in self.doors.values():
            arguments += ["--router", f"127.0.0.1:{door.port}"]
        self.replicas[PROXY] = Replica(PROXY, arguments, self.folder)
        await asyncio.gather(*(asyncio.to_thread(self.replicas[name].start) for name in (*NODES, PROXY)))
        await self.until_whole()

    @property
    def base_url(self) -> str:
        """The proxy's."""
        return f"http://{self.replicas[PROXY].ready['http_address']}/v1"

    async def _start_router(self, name: str) -> None:
        arguments = ["router", "--host", "127.0.0.1", "--port", "0", "--http-port", "0", "--router-id", name]
        replica = Replica(name, [*arguments, *self.router_arguments], self.folder, module=_ROUTER)
        self.replicas[name] = replica
        await asyncio.to_thread(replica.start)
        host, _, port = replica.ready["grpc_address"].rpartition(":")
        replica.arguments += ["--port", port]  # it comes back at the same address
        self.doors[name] = await Relay().listen("127.0.0.1")
        self.doors[name].lead_to(host, int(port))
        self.observers[name] = AsyncClient([f"{host}:{port}"], config=_OBSERVER)

    async def _prepare_node(self, name: str) -> None:
        control, data = self.kv[name] = (await Relay().listen(_RELAY_HOST), await Relay().listen(_RELAY_HOST))
        for relay in (control, data):
            relay.lead_to(_NODE_HOST, relay.port)
        role = "prefill" if name in PREFILL else "decode"
        arguments = [role, "--node-id", name, *self.node_arguments]
        arguments += ["--transport=tcp", f"--transfer-host={_NODE_HOST}", f"--advertised-host={_RELAY_HOST}"]
        arguments += [f"--transfer-port={control.port}", f"--data-port={data.port}"]
        for router in ROUTERS:
            stream = self.streams[name, router] = await Relay().listen("127.0.0.1")
            host, _, port = self.replicas[router].ready["grpc_address"].rpartition(":")
            stream.lead_to(host, int(port))
            arguments += ["--router", f"127.0.0.1:{stream.port}"]
        self.replicas[name] = Replica(name, arguments, self.folder)

    async def repair(self) -> None:
        """Bring back whatever is gone, and wait until all is whole and idle."""
        for name in list(self.stopped):
            self.resume(name)
        for relay in self._relays():
            relay.mend()
        gone = [name for name in self.replicas if not self.is_alive(name)]
        await asyncio.gather(*(asyncio.to_thread(self.replicas[name].start) for name in gone))
        await self.until_whole()

    async def close(self) -> None:
        """End every process and every relay."""
        for name in list(self.stopped):
            self.resume(name)
        for observer in self.observers.values():
            await observer.aclose()
        for relay in self._relays():
            await relay.close()
        alive = [name for name in self.replicas if self.is_alive(name)]
        await asyncio.gather(*(asyncio.to_thread(self._process(name).stop) for name in reversed(alive)))

    def _relays(self) -> list[Relay]:
        pairs = [relay for pair in self.kv.values() for relay in pair]
        return [*pairs, *self.streams.values(), *self.doors.values()]

    # ---- breaking --------------------------------------------------------------------------------

    def _process(self, name: str):
        process = self.replicas[name].process
        assert process is not None
        return process

    def is_alive(self, name: str) -> bool:
        process = self.replicas[name].process
        return process is not None and process.popen.poll() is None

    async def kill(self, name: str) -> None:
        """SIGKILL."""
        self._process(name).popen.send_signal(signal.SIGKILL)
        await asyncio.to_thread(self._process(name).popen.wait, EXIT_TIMEOUT_S)

    def pause(self, name: str) -> None:
        """SIGSTOP, until `resume`."""
        self._process(name).popen.send_signal(signal.SIGSTOP)
        self.stopped.add(name)

    def resume(self, name: str) -> None:
        self.stopped.discard(name)
        if self.is_alive(name):
            self._process(name).popen.send_signal(signal.SIGCONT)

    def tell_to_drain(self, name: str) -> None:
        """SIGTERM."""
        self._process(name).popen.send_signal(signal.SIGTERM)

    async def exit_status(self, name: str) -> int:
        """Of a process that is to end by itself."""
        return await asyncio.to_thread(self._process(name).popen.wait, EXIT_TIMEOUT_S)

    # ---- looking ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncClient]:
        """One that knows both routers."""
        async with AsyncClient([f"127.0.0.1:{door.port}" for door in self.doors.values()]) as client:
            yield client

    def is_here(self, name: str) -> bool:
        """Alive, and not stopped."""
        return name not in self.stopped and self.is_alive(name)

    async def states(self) -> dict[str, ClusterState]:
        """What the routers that can answer say, by router."""
        found: dict[str, ClusterState] = {}
        for name in ROUTERS:
            if self.is_here(name):
                with suppress(KVRelayError, TimeoutError):
                    async with asyncio.timeout(5.0):
                        found[name] = await self.observers[name].cluster_state()
        return found

    async def explanation(self, request_id: str) -> tuple[str, Explanation] | None:
        """The router that has placed the request, and what it says about it."""
        for name in ROUTERS:
            if self.is_here(name):
                with suppress(UnknownRequest):
                    return name, await self.observers[name].explain(request_id)
        return None

    async def until(self, what: str, is_so: Callable[[dict[str, ClusterState]], bool]) -> None:
        """Wait until the routers' states are so.

        Raises:
            NotSeen: they were not, for `WAIT_S`.
        """
        states: dict[str, ClusterState] = {}
        try:
            async with asyncio.timeout(WAIT_S):
                while not is_so(states := await self.states()):  # noqa: ASYNC110  # other processes' states
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise NotSeen(f"not seen within {WAIT_S:g} s: {what}; last: {str(states)[:300]}") from None

    async def until_whole(self) -> None:
        """Every process is there, every router has every node, and nobody holds anything."""
        await self.until(
            "all are attached and idle",
            lambda states: (
                len(states) == len(ROUTERS) and all(self.is_whole(state) for state in states.values())
            ),
        )

    def is_whole(self, state: ClusterState) -> bool:
        """Whether a router has all nodes that are alive, and nothing is held."""
        attached = {node.node_id for node in state.nodes}
        return attached == {name for name in NODES if self.is_alive(name)} and is_idle(state)

    def log_of(self, name: str) -> str:
        """The end of it."""
        return self._process(name).log()
