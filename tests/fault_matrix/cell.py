"""One cell of the matrix: a request is brought into a state, a fault strikes, and what follows is judged."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from random import Random
from typing import Final

from kvrelay.core.cluster_view import ClusterState
from kvrelay.core.errors import RequestCancelled
from tests.fault_matrix.breakable_cluster import ROUTERS, BreakableCluster
from tests.fault_matrix.caller import Caller, UnbrokenRun
from tests.fault_matrix.faults import Fault
from tests.fault_matrix.scene import Scene
from tests.fault_matrix.states import State

LEASE_S: Final = 10.0
"""The routers' default: how long a node holds KV for a router that it does not hear."""
GRACE_S: Final = 2.0
"""Ticks, load reports and polling, on a busy machine."""
ANSWER_TIMEOUT_S: Final = 120.0
_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class CellResult:
    """What a cell came to. `complaint` is empty when it is green.

    `pause_s` is the longest time without a token after the fault, None where the request was over;
    `free_s` from the fault until nobody held anything any more.
    """

    state: str
    fault: str
    client_view: str
    complaint: str
    num_client_attempts: int
    num_router_attempts: int
    pause_s: float | None
    free_s: float | None
    num_leaked_blocks: int

    @property
    def is_green(self) -> bool:
        return not self.complaint


async def run_cell(
    cluster: BreakableCluster, state: State, fault: Fault, unbroken: UnbrokenRun, rng: Random
) -> CellResult:
    """Play one cell. The cluster is as the fault left it afterwards: see `BreakableCluster.repair`.

    Raises:
        NotSeen: the state was not reached.
    """
    async with cluster.client() as client:
        scene = Scene(cluster, client, unbroken, rng)
        try:
            await state.reach(scene)
            aftermath = asyncio.create_task(fault.strike(scene))
            try:
                await _until_over(scene.it)
                await aftermath
            finally:
                aftermath.cancel()
                await asyncio.gather(aftermath, return_exceptions=True)
            await scene.let_go()
            free_s, num_leaked, remark = await _until_free(scene)
        finally:
            await scene.let_go()
            if scene.caller is not None and not scene.caller.ended.is_set():
                await scene.caller.leave()
    remarks = [scene.it.complaint(), *scene.remarks, remark]
    return CellResult(
        state=state.key,
        fault=fault.key,
        client_view=_client_view(scene.it),
        complaint="; ".join(filter(None, remarks)),
        num_client_attempts=_num_client_attempts(scene.it),
        num_router_attempts=scene.it.result.report.num_attempts if scene.it.result else 0,
        pause_s=None if scene.it.has_left else scene.it.longest_pause_s(scene.struck_s),
        free_s=free_s,
        num_leaked_blocks=num_leaked,
    )


async def _until_over(caller: Caller) -> None:
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await caller.ended.wait()
    except TimeoutError:
        return  # the caller's complaint


def _client_view(caller: Caller) -> str:
    if caller.has_left:
        return f"left with {caller.progress}"
    if isinstance(caller.error, RequestCancelled):
        return "cancelled, as it wished"
    if caller.error is not None:
        return f"{caller.error_name} after {caller.progress}"
    return f"{caller.progress}, as unbroken" if not caller.complaint() else "wrong"


def _num_client_attempts(caller: Caller) -> int:
    result = caller.result
    return 1 + result.num_retries + result.num_continuations if result else 0


async def _until_free(scene: Scene) -> tuple[float | None, int, str]:
    """Wait until no survivor holds anything: how long after the fault that was, the blocks that are still
    held where it never was, and what is wrong."""
    since_s = max(scene.lifted_s, scene.it.ended_s or scene.struck_s)
    cluster = scene.cluster
    states: dict[str, ClusterState] = {}
    while time.monotonic() < since_s + LEASE_S + GRACE_S:
        states = await cluster.states()
        alive = {name for name in ROUTERS if cluster.is_alive(name)}
        if states.keys() == alive and all(cluster.is_whole(state) for state in states.values()):
            return time.monotonic() - scene.struck_s, 0, ""
        await asyncio.sleep(_POLL_S)
    held = {
        str(node.node_id): node.load.num_held_blocks if node.load else 0
        for state in states.values()
        for node in state.nodes
    }
    books = {name: {key: n for key, n in state.num_requests.items() if n} for name, state in states.items()}
    return None, sum(held.values()), f"not free after the lease: blocks {held}, requests {books}"
