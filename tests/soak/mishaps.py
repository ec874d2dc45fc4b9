"""What happens to the cluster during the soak, drawn from a seed."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Final

from tests.fault_matrix.breakable_cluster import NODES, ROUTERS, BreakableCluster

MORTAL: Final = ("router-a", "p0", "d0")
"""Killed, drained, and started again."""
LONG_LIVED: Final = ("router-b", "p1", "d1", "proxy")
"""Only stopped and cut off, so that what they hold on to shows."""


@dataclass
class Mishaps:
    """One after another until cancelled or told to `end`; each is over, and what it ended is started again,
    before the next begins."""

    cluster: BreakableCluster
    rng: Random
    num: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    _is_over: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._is_over.clear()
        self._task = asyncio.create_task(self._run())

    async def end(self) -> None:
        self._is_over.set()
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        while not self._is_over.is_set():
            await self._pass_time(self.rng.uniform(0.5, 4.0))
            what = self.rng.choice(
                (self._kill, self._kill, self._stop, self._drain, self._cut_stream, self._cut_kv)
            )
            self.num[what.__name__.removeprefix("_")] += 1
            await what()

    async def _pass_time(self, for_s: float) -> None:
        try:
            async with asyncio.timeout(for_s):
                await self._is_over.wait()
        except TimeoutError:
            return

    async def _kill(self) -> None:
        name = self.rng.choice(MORTAL)
        await self.cluster.kill(name)
        await self._start_again(name)

    async def _drain(self) -> None:
        name = self.rng.choice(MORTAL)
        self.cluster.tell_to_drain(name)
        status = await self.cluster.exit_status(name)
        if status != 0:
            self.faults.append(f"{name}, told to drain, left with exit status {status}")
        await self._start_again(name)

    async def _start_again(self, name: str) -> None:
        await self._pass_time(self.rng.uniform(0.0, 3.0))
        await asyncio.to_thread(self.cluster.replicas[name].start)

    async def _stop(self) -> None:
        name = self.rng.choice((*MORTAL, *LONG_LIVED))
        self.cluster.pause(name)
        await self._pass_time(self.rng.uniform(0.5, 15.0))
        self.cluster.resume(name)

    async def _cut_stream(self) -> None:
        stream = self.cluster.streams[self.rng.choice(NODES), self.rng.choice(ROUTERS)]
        stream.cut()
        await self._pass_time(self.rng.uniform(0.0, 12.0))
        stream.mend()

    async def _cut_kv(self) -> None:
        relays = self.cluster.kv[self.rng.choice(NODES)]
        for relay in relays:
            if self.rng.random() < 0.5:
                relay.cut()
            else:
                relay.silence()
        await self._pass_time(self.rng.uniform(0.0, 12.0))
        for relay in relays:
            relay.mend()
