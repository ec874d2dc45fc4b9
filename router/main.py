"""A router's process: serve until told to stop, drain, exit."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Final

import uvloop

from kvrelay.core.errors import KVRelayError
from kvrelay.node.monotonic_clock import MonotonicClock
from kvrelay.node.pulse import Pulse
from kvrelay.node.ready_file import write_ready_file
from kvrelay.node.sd_notify import Notifier
from kvrelay.node.stop_signals import StopSignals
from kvrelay.router.server import CLOSE_TIMEOUT_S, RouterServer
from kvrelay.router.server_config import RouterConfig

logger = logging.getLogger(__name__)

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_CONFIG: Final = 2
EXIT_INTERRUPTED: Final = 130

_LOOPBACK_OF: Final = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


def run_router(config: RouterConfig) -> int:
    """Run one router until SIGTERM or SIGINT; returns the exit status.

    0: left cleanly; 1: a bug, or it was told twice to stop; 2: it can't run as configured. What went wrong
    is on stderr.
    """
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    faulthandler.enable()  # a watchdog's SIGABRT leaves the stacks of all threads in the log
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config))
    except KVRelayError as error:
        return _complain(error.message)
    except OSError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _complain(text: str) -> int:
    for line in text.splitlines():
        print(f"kvrelay router: {line}", file=sys.stderr)
    return EXIT_CONFIG


async def _serve(config: RouterConfig) -> int:
    server = RouterServer(config, MonotonicClock())
    # What stands still here is the event loop, and then nothing beats.
    pulse = Pulse(Notifier.from_environment(), lambda: 0.0, server.describe)
    with StopSignals() as signals:
        await server.start()
        # What has been loaded stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        _announce_ready(config, server)
        pulse.ready()
        beating = asyncio.create_task(pulse.run(), name="pulse")
        try:
            return await until_stopped(config, server, signals, pulse.notifier)
        finally:
            beating.cancel()


def _announce_ready(config: RouterConfig, server: RouterServer) -> None:
    host = config.listen_host
    # Who reads the file is on this machine.
    reachable = _LOOPBACK_OF.get(host, host)
    logger.info("ready grpc=%s:%d http=%s:%d", host, server.grpc_port, host, server.http_port)
    if config.ready_file:
        facts: dict[str, str | int] = {
            "pid": os.getpid(),
            "role": "router",
            "grpc_address": f"{reachable}:{server.grpc_port}",
            "http_address": f"{reachable}:{server.http_port}",
        }
        write_ready_file(Path(config.ready_file), facts)


async def until_stopped(
    config: RouterConfig, server: RouterServer, signals: StopSignals, notifier: Notifier
) -> int:
    """Wait for a signal or a bug, then stop; returns the exit status."""
    told = asyncio.create_task(signals.first.wait())
    told_twice = asyncio.create_task(signals.second.wait())
    try:
        ends: tuple[asyncio.Future[Any], ...] = (told, server.shell.bug)
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if server.shell.bug.done():
            traceback.print_exception(server.shell.bug.result())
            return EXIT_FAILED
        logger.info("draining timeout_s=%g", config.drain_timeout_s)
        notifier.stopping("draining", config.drain_timeout_s + CLOSE_TIMEOUT_S)
        stopping = asyncio.create_task(server.stop(config.drain_timeout_s))
        stops: tuple[asyncio.Future[Any], ...] = (stopping, told_twice)
        await asyncio.wait(stops, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            await stopping
            return EXIT_OK
        stopping.cancel()
        await asyncio.gather(stopping, return_exceptions=True)
        await server.stop(0.0)
        return EXIT_FAILED
    finally:
        told.cancel()
        told_twice.cancel()
