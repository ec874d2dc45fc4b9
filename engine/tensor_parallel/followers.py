"""Rank 0's side of the other ranks: their processes, started, fed and watched."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import threading
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Final, TypeVar

import torch.multiprocessing  # noqa: F401 - teaches pipes to carry tensors
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from kvrelay.core.errors import ConfigError, EngineFailed
from kvrelay.engine.model.parallel import Shard
from kvrelay.engine.tensor_parallel.collectives import CONNECT_TIMEOUT
from kvrelay.engine.tensor_parallel.commands import Command, FollowerFailed, Loaded, Reply, Started
from kvrelay.engine.tensor_parallel.follower import EXIT_FAILED, FollowerSetup, run_follower
from kvrelay.engine.tensor_parallel.host_memory import SharedHostMemory
from kvrelay.engine.torch_rank import EnginePlan

LOAD_TIMEOUT_S: Final = 3600.0
LEAVE_TIMEOUT_S: Final = 10.0
LOST_RANK_EXIT_S: Final = 5.0
"""A GPU that waits in a kernel for a rank that is gone waits for ever, and with it the thread that reads its
results: after so long the process ends itself, as the service manager expects of a broken one."""

logger = logging.getLogger(__name__)

_Expected = TypeVar("_Expected", Started, Loaded)


class Followers:
    """Processes of ranks 1 to size - 1. `wait_started`, then `wait_loaded`, then `send` for each step.

    Raises:
        ConfigError: a cache in host memory can't be shared.
    """

    def __init__(self, plan: EnginePlan) -> None:
        self._is_cuda = plan.config.device != "cpu"
        size = plan.config.tensor_parallel_size
        self.store = TCPStore("127.0.0.1", 0, size, True, CONNECT_TIMEOUT, wait_for_workers=False)
        self._memories = [self._memory(plan) for _ in range(1, size)]
        self._pipes: list[Connection[Command, Reply]] = []
        self._processes: list[SpawnProcess] = []
        self._failure = ""
        self._is_closing = threading.Event()
        context = multiprocessing.get_context("spawn")
        for rank, memory in enumerate(self._memories, start=1):
            mine, theirs = context.Pipe()
            setup = FollowerSetup(plan, Shard(rank, size), self.store.port, theirs, memory)
            process = context.Process(
                target=run_follower, args=(setup,), name=f"kvrelay-rank-{rank}", daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        atexit.register(self._close_pipes)  # or multiprocessing would wait for them for ever
        threading.Thread(target=self._watch, name="rank-watch", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """Of the processes, by rank from 1 on."""
        return [process.pid for process in self._processes if process.pid is not None]

    def wait_started(self) -> None:
        """Return when every rank has its device.

        Raises:
            ConfigError: a rank can't run here.
        """
        for rank in range(1, len(self._pipes) + 1):
            self._receive(rank, Started)

    def wait_loaded(self, like: Tensor) -> list[Tensor]:
        """The caches of all followers, by rank, once their weights are there; `like` is rank 0's own.

        Raises:
            ConfigError: a rank could not load its part.
        """
        caches = []
        for rank, memory in enumerate(self._memories, start=1):
            loaded = self._receive(rank, Loaded)
            cache = loaded.cache if memory is None else memory.bytes.view(like.dtype).view(like.shape)
            assert cache is not None
            caches.append(cache)
            if memory is not None:
                memory.close_descriptor()
        return caches

    def send(self, command: Command) -> None:
        """Give every rank a step to compute.

        Raises:
            EngineFailed: a rank is gone.
        """
        message = reduction.ForkingPickler.dumps(command)
        try:
            for pipe in self._pipes:
                pipe.send_bytes(message)
        except OSError as error:
            raise EngineFailed(self._failure or f"a rank can't be reached: {error}") from error

    def close(self) -> None:
        """Have the processes leave, and wait until they have."""
        atexit.unregister(self._close_pipes)
        self._close_pipes()
        for process in self._processes:
            process.join(LEAVE_TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()

    def _close_pipes(self) -> None:
        self._is_closing.set()
        for pipe in self._pipes:
            pipe.close()

    def _memory(self, plan: EnginePlan) -> SharedHostMemory | None:
        if self._is_cuda:
            return None
        return SharedHostMemory(plan.layout.total_bytes // plan.config.tensor_parallel_size)

    def _receive(self, rank: int, kind: type[_Expected]) -> _Expected:
        pipe = self._pipes[rank - 1]
        try:
            if not pipe.poll(LOAD_TIMEOUT_S):
                raise ConfigError(f"tensor parallel rank {rank} did not load in {LOAD_TIMEOUT_S:g} s")
            reply = pipe.recv()
        except EOFError:
            raise ConfigError(f"tensor parallel rank {rank} ended while it was loading") from None
        if isinstance(reply, FollowerFailed):
            raise ConfigError(f"tensor parallel rank {rank}: {reply.message}")
        assert isinstance(reply, kind)
        return reply

    def _watch(self) -> None:
        ended = wait([process.sentinel for process in self._processes])
        if self._is_closing.is_set():
            return
        names = [process.name for process in self._processes if process.sentinel in ended]
        self._failure = f"{', '.join(names)} ended unexpectedly"
        logger.critical("%s", self._failure)
        if self._is_cuda and not self._is_closing.wait(LOST_RANK_EXIT_S):
            os._exit(EXIT_FAILED)
