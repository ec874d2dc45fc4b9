"""Whether a proxy can serve, and whether its workers' event loops turn: what its service manager is told."""

from __future__ import annotations

import asyncio
import mmap
import time
from typing import Final

from kvrelay.client import AsyncClient
from kvrelay.core.errors import KVRelayError
from kvrelay.node.pulse import Pulse

_RETRY_S: Final = 0.5
_ITEM_BYTES: Final = 8


class LifeBoard:
    """When each worker was last alive, in memory that they share. Times are of the monotonic clock, which is
    one for all processes; 0: the worker is not ready yet."""

    def __init__(self, num_workers: int) -> None:
        self._seen = memoryview(mmap.mmap(-1, num_workers * _ITEM_BYTES)).cast("d")

    def beat(self, worker: int) -> None:
        """This worker is ready, and alive."""
        self._seen[worker] = time.monotonic()

    def forget(self, worker: int) -> None:
        """This worker is gone; who takes its place is not ready yet."""
        self._seen[worker] = 0.0

    @property
    def are_all_ready(self) -> bool:
        return all(self._seen)

    def stuck_for_s(self) -> float:
        """How long ago the quietest of the ready workers was alive."""
        return time.monotonic() - min((seen for seen in self._seen if seen), default=time.monotonic())


async def until_servable(client: AsyncClient) -> None:
    """Return once a router serves a model and its tokenizer, where it has one, is here."""
    while True:
        try:
            models = await client.list_models()
            for model in models:
                if model.tokenizer_digest:
                    await client.tokenizer(model.name)
            if models:
                return
        except KVRelayError:
            pass  # the next round asks again
        await asyncio.sleep(_RETRY_S)


async def keep_pulse(pulse: Pulse, client: AsyncClient) -> None:
    """A lone worker's: it tells the service manager itself."""
    beating = asyncio.create_task(pulse.run(), name="pulse")
    try:
        await until_servable(client)
        pulse.ready()
        await beating
    finally:
        beating.cancel()


async def keep_board(board: LifeBoard, worker: int, interval_s: float, client: AsyncClient) -> None:
    """One of several workers': it tells the process that has started it."""
    await until_servable(client)
    while True:
        board.beat(worker)
        await asyncio.sleep(interval_s)
