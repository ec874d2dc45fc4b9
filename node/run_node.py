"""A node's process: load, serve until told to stop, drain, exit."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import uvloop

from kvrelay.core.errors import KVRelayError
from kvrelay.core.node_messages import Role
from kvrelay.engine.config import EngineKind
from kvrelay.engine.factory import load_engine
from kvrelay.engine.interface import Engine
from kvrelay.kv_transfer.service import KVTransferService
from kvrelay.node.config import NodeConfig
from kvrelay.node.core import NodeCore, NodeCoreConfig
from kvrelay.node.load_progress import STALLED_LOAD_S, LoadProgress
from kvrelay.node.monotonic_clock import MonotonicClock
from kvrelay.node.pulse import Pulse
from kvrelay.node.ready_file import write_ready_file
from kvrelay.node.sd_notify import Notifier
from kvrelay.node.service import CLOSE_TIMEOUT_S, NodeService
from kvrelay.node.stop_signals import StopSignals
from kvrelay.node.tokenizer_bundle import build_tokenizer_bundle
from kvrelay.node.transfer_host import with_transfer_host
from kvrelay.node.warm_up import warm_up

logger = logging.getLogger(__name__)

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_CONFIG: Final = 2
EXIT_INTERRUPTED: Final = 130
GPU_SWITCH_INTERVAL_S: Final = 0.0005
"""How long a thread of a GPU node may keep the interpreter from the others. Python's 5 ms are most of a
decode step there, and the engine's and the transfer's thread hand over many times in each."""

MakeCore = Callable[[NodeCoreConfig], NodeCore]


def run_node(config: NodeConfig, make_core: MakeCore) -> int:
    """Run one node until SIGTERM or SIGINT; returns the exit status.

    0: left cleanly; 1: the engine or the node failed, or it was told twice to stop; 2: it can't run as
    configured. What went wrong is on stderr, one line each.
    """
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    faulthandler.enable()  # a watchdog's SIGABRT leaves the stacks of all threads in the log
    notifier = Notifier.from_environment()
    try:
        engine = load_engine(config.engine, LoadProgress(sys.stderr, notifier))
        if config.engine.device != "cpu":
            sys.setswitchinterval(GPU_SWITCH_INTERVAL_S)
        notifier.extend("warming up", STALLED_LOAD_S)
        warm_up(engine)
        tokenizer = _build_tokenizer(config)
        # What has been loaded stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        core_config = NodeCoreConfig(
            _max_attempts(config), engine.info.fingerprint.digest, config.pull_timeout_s
        )
        with closing(engine), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, make_core(core_config), engine, tokenizer, notifier))
    except KVRelayError as error:
        for line in error.message.splitlines():
            _complain(config.role, line)
        return EXIT_CONFIG
    except OSError as error:
        _complain(config.role, str(error))
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _complain(role: Role, line: str) -> None:
    print(f"kvrelay {role}: {line}", file=sys.stderr)


def _max_attempts(config: NodeConfig) -> int:
    """On a prefill node every attempt has a transfer: better refused than failed when those run out."""
    if config.role is Role.PREFILL:
        return min(config.max_attempts_in_flight, config.transfer.max_concurrent_transfers)
    return config.max_attempts_in_flight


def _build_tokenizer(config: NodeConfig) -> bytes | None:
    folder = config.engine.tokenizer
    if not folder and config.engine.engine is EngineKind.TORCH:
        folder = config.engine.model
    return build_tokenizer_bundle(Path(folder)) if folder else None


async def _serve(
    config: NodeConfig, core: NodeCore, engine: Engine, tokenizer: bytes | None, notifier: Notifier
) -> int:
    with StopSignals() as signals:
        reachable = await _until_reachable(config, notifier, signals)
        if reachable is None:
            return EXIT_OK
        service = NodeService(
            reachable, core, engine, KVTransferService, clock=MonotonicClock(), tokenizer=tokenizer
        )
        pulse = Pulse(notifier, service.stuck_for_s, service.describe)
        beating: asyncio.Task[None] | None = None
        try:
            notifier.extend("preparing the engine", STALLED_LOAD_S)
            await service.start()
            beating = asyncio.create_task(pulse.run(), name="pulse")
            status, at_once = await _until_stopped(config, service, signals, pulse)
        except BaseException:
            await service.close(at_once=True)
            raise
        await service.close(at_once=at_once)
        if beating is not None:
            beating.cancel()
    return status


async def _until_reachable(config: NodeConfig, notifier: Notifier, signals: StopSignals) -> NodeConfig | None:
    """The configuration with an address that peers can dial; None: told to stop before one was found."""
    finding = asyncio.create_task(with_transfer_host(config, notifier))
    told = asyncio.create_task(signals.first.wait())
    await _first_of(finding, told)
    told.cancel()
    if finding.done():
        return await finding
    finding.cancel()
    return None


async def _until_stopped(
    config: NodeConfig, service: NodeService, signals: StopSignals, pulse: Pulse
) -> tuple[int, bool]:
    """Returns the exit status, and whether to leave at once."""
    ready = asyncio.create_task(_announce_ready(config, service, pulse))
    first, second = asyncio.create_task(signals.first.wait()), asyncio.create_task(signals.second.wait())
    asked = asyncio.create_task(service.drain_asked.wait())
    try:
        await _first_of(first, asked, service.failed)
        if asked.done() and not first.done():
            signals.first.set()  # a signal from now on is the second word
        if not service.failed.done():
            pulse.notifier.stopping("draining", config.drain_timeout_s + CLOSE_TIMEOUT_S)
            drain = asyncio.create_task(service.drain())
            await _first_of(drain, second, service.failed)
            if drain.done():
                return EXIT_OK, False
            drain.cancel()
        if service.failed.done():
            _complain(config.role, service.failed.result())
            return EXIT_FAILED, False
        _complain(config.role, "told twice to stop: leaving at once")
        return EXIT_FAILED, True
    finally:
        for task in (ready, first, second, asked):
            task.cancel()


async def _first_of(*ends: asyncio.Future[Any]) -> None:
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)


async def _announce_ready(config: NodeConfig, service: NodeService, pulse: Pulse) -> None:
    await service.attached.wait()
    logger.info("ready node=%s transfer=%s", service.node_id, service.transfer_address)
    if config.ready_file:
        facts: dict[str, str | int] = {
            "pid": os.getpid(),
            "role": config.role.value,
            "node_id": service.node_id,
            "transfer_address": service.transfer_address,
        }
        write_ready_file(Path(config.ready_file), facts)
    pulse.ready()
