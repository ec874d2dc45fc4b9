"""Plays cells on several clusters side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

from kvrelay.core.errors import KVRelayError
from kvrelay.engine.embedded_model import ensure_smollm2
from tests.fault_matrix.breakable_cluster import BreakableCluster, NotSeen
from tests.fault_matrix.caller import UnbrokenRun
from tests.fault_matrix.cell import CellResult, run_cell
from tests.fault_matrix.faults import FAULTS, Fault
from tests.fault_matrix.impossible import why_impossible
from tests.fault_matrix.states import NODE_ARGUMENTS, ROUTER_ARGUMENTS, STATES, State

MAX_TRIES: Final = 4
"""A state may have passed by before it was seen, on a machine that is busy: then it is tried anew."""


def possible_cells(states: Sequence[str] = (), faults: Sequence[str] = ()) -> list[tuple[State, Fault]]:
    """All that can occur, of these states and faults; none given: of all."""
    return [
        (state, fault)
        for state in STATES
        for fault in FAULTS
        if (not states or state.key in states)
        and (not faults or fault.key in faults)
        and not why_impossible(state.key, fault.key)
    ]


@dataclass
class Player:
    """`tell` hears of each result as it comes."""

    folder: Path
    seed: int
    tell: Callable[[CellResult], None]
    results: list[CellResult] = field(default_factory=list)
    _num_clusters: int = 0

    async def play(self, cells: Sequence[tuple[State, Fault]], num_lanes: int) -> list[CellResult]:
        """The results, in the order in which they came."""
        waiting = list(reversed(cells))
        async with asyncio.TaskGroup() as lanes:
            for _ in range(min(num_lanes, len(cells))):
                lanes.create_task(self._lane(waiting))
        return self.results

    async def _lane(self, waiting: list[tuple[State, Fault]]) -> None:
        unbroken = UnbrokenRun(str(ensure_smollm2()))
        cluster = await self._new_cluster()
        try:
            while waiting:
                state, fault = waiting.pop()
                result = await self._play_cell(cluster, state, fault, unbroken)
                self.results.append(result)
                self.tell(result)
                if not result.is_green or not await _is_repaired(cluster):
                    await cluster.close()
                    cluster = await self._new_cluster()
        finally:
            await cluster.close()

    async def _new_cluster(self) -> BreakableCluster:
        self._num_clusters += 1
        folder = self.folder / f"cluster{self._num_clusters}"
        folder.mkdir()
        cluster = BreakableCluster(folder, NODE_ARGUMENTS, ROUTER_ARGUMENTS)
        try:
            await cluster.start()
        except BaseException:
            await cluster.close()
            raise
        return cluster

    async def _play_cell(
        self, cluster: BreakableCluster, state: State, fault: Fault, unbroken: UnbrokenRun
    ) -> CellResult:
        seen = ""
        for number in range(MAX_TRIES):
            rng = Random(f"{self.seed} {state.key} {fault.key} {number}")
            try:
                return await run_cell(cluster, state, fault, unbroken, rng)
            except (NotSeen, KVRelayError) as error:
                seen = str(error)
                await _is_repaired(cluster)
        logs = "\n".join(f"{name}: {cluster.log_of(name)}" for name in cluster.replicas)
        (cluster.folder / "not-reached.log").write_text(logs)
        return CellResult(state.key, fault.key, "", f"the state was not reached: {seen}", 0, 0, None, None, 0)


async def _is_repaired(cluster: BreakableCluster) -> bool:
    with suppress(NotSeen):
        await cluster.repair()
        return True
    return False
