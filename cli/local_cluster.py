"""A cluster of child processes on this machine: started in order, watched, stopped in order."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from kvrelay.cli.child import Child, last_lines, start_child
from kvrelay.cli.config import ClusterConfig
from kvrelay.cli.status_view import counts_of
from kvrelay.core.errors import NodeUnavailable

ResultT = TypeVar("ResultT")
_PROGRESS_INTERVAL_S: Final = 0.2
_WATCH_INTERVAL_S: Final = 0.1
_LOG_PREFIX: Final = re.compile(r"^[\d-]+ [\d:,.]+ [A-Z]+ \S+ ")


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What to start. The arguments go to the services as they stand."""

    config: ClusterConfig
    folder: Path
    router_arguments: tuple[str, ...]
    node_arguments: tuple[str, ...]
    proxy_arguments: tuple[str, ...] = ()


@dataclass(slots=True)
class LocalCluster:
    """One router, its nodes, perhaps a proxy. Use `start`, then `while_alive`; and always `stop`."""

    plan: LaunchPlan
    on_progress: Callable[[str], None]
    router: Child | None = None
    nodes: list[Child] = field(default_factory=list)
    proxy: Child | None = None
    is_ready: bool = False

    @property
    def address(self) -> str:
        """Where the router listens; known once it is ready."""
        assert self.router is not None
        return str(self.router.facts["grpc_address"])

    @property
    def children(self) -> list[Child]:
        return [child for child in (self.proxy, *self.nodes, self.router) if child is not None]

    async def start(self) -> None:
        """Start everything and return when the router sees every node.

        Raises:
            ChildDiedError: a service ended; the message says which and why.
            NodeUnavailable: it took longer than `start_timeout_s`.
        """
        try:
            async with asyncio.timeout(self.plan.config.start_timeout_s):
                await self._start_router()
                await self._start_nodes()
                self.on_progress("waiting until the router sees all nodes")
                await self.while_alive(self._wait_attached())
                await self._start_proxy()
                self.is_ready = True
        except TimeoutError:
            raise NodeUnavailable(self._describe_delay()) from None

    async def while_alive(self, work: Awaitable[ResultT]) -> ResultT:
        """The outcome of `work`, unless a service ends first.

        Raises:
            ChildDiedError: it did; `work` is cancelled.
        """
        task = asyncio.ensure_future(work)
        deaths = [asyncio.ensure_future(child.wait_died()) for child in self.children]
        try:
            await asyncio.wait([task, *deaths], return_when=asyncio.FIRST_COMPLETED)
            # A death explains a failed `work`, so it comes first.
            for death in deaths:
                if death.done():
                    death.result()
            return task.result()
        finally:
            await _cancel_all([task, *deaths])

    async def wait_for_death(self) -> None:
        """Return never; see `while_alive`."""
        await self.while_alive(asyncio.Event().wait())

    async def stop(self) -> None:
        """Ask the proxy to leave, then the nodes, then the router; kill what does not. Leaves no process
        behind."""
        stop_timeout_s = self.plan.config.stop_timeout_s
        try:
            for group in ([self.proxy], self.nodes, [self.router]):
                running = [child for child in group if child is not None]
                for child in running:
                    child.signal(signal.SIGTERM)
                await asyncio.gather(*(child.wait_gone(stop_timeout_s) for child in running))
        finally:
            self.send_kill()
            for child in self.children:
                await child.process.wait()

    def send_kill(self) -> None:
        """End whatever still runs, at once."""
        for child in self.children:
            child.signal(signal.SIGKILL)

    async def _start_router(self) -> None:
        self.on_progress("starting the router")
        arguments = ["router", *self.plan.router_arguments]
        self.router = await start_child("router", arguments, self.plan.folder)
        await self.while_alive(self.router.wait_ready())

    async def _start_nodes(self) -> None:
        for role, count in (("prefill", self.plan.config.prefill), ("decode", self.plan.config.decode)):
            for index in range(count):
                name = f"{role}-{index}"
                identity = ["--router", self.address, "--node-id", name]
                arguments = [role, *self.plan.node_arguments, *identity]
                self.nodes.append(await start_child(name, arguments, self.plan.folder))
        await self.while_alive(self._wait_nodes_ready())

    async def _start_proxy(self) -> None:
        if self.plan.config.proxy:
            self.on_progress("starting the OpenAI proxy")
            arguments = ["proxy", *self.plan.proxy_arguments, "--router", self.address]
            self.proxy = await start_child("proxy", arguments, self.plan.folder)
            await self.while_alive(self.proxy.wait_ready())

    async def _wait_nodes_ready(self) -> None:
        progress = asyncio.ensure_future(self._show_progress())
        try:
            await asyncio.gather(*(node.wait_ready() for node in self.nodes))
        finally:
            await _cancel_all([progress])

    async def _show_progress(self) -> None:
        """Tell what the slowest node says it is doing, again and again."""
        while True:
            waiting = [node for node in self.nodes if not node.ready_file.exists()]
            words = last_lines(waiting[0].log_file, 1) if waiting else []
            ready = f"{len(self.nodes) - len(waiting)} of {len(self.nodes)} nodes ready"
            said = _LOG_PREFIX.sub("", words[0]) if words else ""
            self.on_progress(f"{ready}; {waiting[0].name}: {said}" if said else ready)
            await asyncio.sleep(_PROGRESS_INTERVAL_S)

    async def _wait_attached(self) -> None:
        from kvrelay.client import AsyncClient

        wanted = {"prefill": self.plan.config.prefill, "decode": self.plan.config.decode}
        async with AsyncClient([self.address]) as client:
            async for state in client.watch_cluster(interval_s=_WATCH_INTERVAL_S):
                if counts_of(state) == wanted:
                    return

    def _describe_delay(self) -> str:
        late = [child.name for child in self.children if not child.ready_file.exists()]
        who = f"{', '.join(late)} not ready" if late else "not all nodes are attached"
        return f"{who} after {self.plan.config.start_timeout_s:g} s; logs are in {self.plan.folder}"


async def _cancel_all(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel and await, so that nothing is left running and no outcome goes unread."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task
