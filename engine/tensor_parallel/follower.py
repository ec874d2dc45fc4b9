"""The process of a rank other than the first: computes what rank 0 computes, on its own part."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from kvrelay.core.errors import KVRelayError
from kvrelay.engine.forward_pass import StepInputs
from kvrelay.engine.model.parallel import Shard
from kvrelay.engine.tensor_parallel.collectives import CONNECT_TIMEOUT, TorchCollectives
from kvrelay.engine.tensor_parallel.commands import Command, FollowerFailed, Loaded, Reply, Started
from kvrelay.engine.tensor_parallel.host_memory import SharedHostMemory
from kvrelay.engine.torch_rank import EnginePlan, TorchRank, open_device

EXIT_FAILED = 1
LEAVE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class FollowerSetup:
    """What a follower is started with. `memory`: for its cache, where that is host memory."""

    plan: EnginePlan
    shard: Shard
    store_port: int
    pipe: Connection[Reply, Command]
    memory: SharedHostMemory | None


def run_follower(setup: FollowerSetup) -> None:
    """The process's main function: returns when rank 0 closes the pipe, exits at once when it is gone.

    Signals to stop go to all of a terminal's or a service's processes; rank 0 alone decides what they mean,
    and needs the others until it has drained.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, name="parent-watch", daemon=True).start()
    logging.basicConfig(
        level="WARNING", format=f"%(asctime)s %(levelname)s rank {setup.shard.rank} %(message)s"
    )
    try:
        _run(setup)
    except Exception as error:  # the process's outermost frame
        message = error.message if isinstance(error, KVRelayError) else f"{type(error).__name__}: {error}"
        logging.getLogger(__name__).exception("rank %d failed", setup.shard.rank)
        with suppress(OSError):
            setup.pipe.send(FollowerFailed(message))
        sys.stderr.flush()
        os._exit(EXIT_FAILED)  # without the destructors of what may hang in a collective


def _run(setup: FollowerSetup) -> None:
    plan, pipe = setup.plan, setup.pipe
    if plan.config.num_threads is not None:
        torch.set_num_threads(plan.config.num_threads)
    device = open_device(plan, setup.shard.rank)
    pipe.send(Started())
    collectives = TorchCollectives(
        setup.shard,
        device.device,
        TCPStore("127.0.0.1", setup.store_port, setup.shard.size, timeout=CONNECT_TIMEOUT),
        dtype=plan.dtype,
        hidden_size=plan.model_config.hidden_size,
        max_rows=plan.config.max_num_batched_tokens,
    )
    memory = None if setup.memory is None else setup.memory.bytes
    rank = TorchRank(plan, device, collectives, memory)
    pipe.send(Loaded(rank.cache if rank.cache.is_cuda else None))
    graphs = device.decode_graphs(
        rank.model,
        rank.attention,
        plan.model_config.vocab_size,
        plan.config.max_num_seqs,
        plan.layout.block_size,
    )
    if graphs is not None:
        graphs.capture()
    rank.forward_pass.prepare_thread()
    with suppress(EOFError), torch.inference_mode():
        while True:
            command = pipe.recv()
            if isinstance(command, StepInputs):
                rank.forward_pass.run(command, None)
            elif isinstance(command, tuple):
                assert rank.mover is not None
                rank.mover.move(command)
            else:
                assert graphs is not None
                graphs.replay(command)
    leaving = threading.Timer(LEAVE_TIMEOUT_S, os._exit, (EXIT_FAILED,))  # a sum may wait for ever
    leaving.daemon = True
    leaving.start()
    collectives.close()
    leaving.cancel()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(EXIT_FAILED)
