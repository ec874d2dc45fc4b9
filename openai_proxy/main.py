"""A proxy's processes: one worker here, or several that share the port and are replaced when they die."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final

from kvrelay.node.parent_death import die_with
from kvrelay.node.pulse import Pulse
from kvrelay.node.ready_file import write_ready_file
from kvrelay.node.sd_notify import Notifier
from kvrelay.openai_proxy.access import Access, ApiKey, read_keys
from kvrelay.openai_proxy.config import ProxyConfig
from kvrelay.openai_proxy.life_signs import LifeBoard, keep_board, keep_pulse
from kvrelay.openai_proxy.listening import listen
from kvrelay.openai_proxy.usage_board import UsageBoard

logger = logging.getLogger(__name__)

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
MIN_LIFE_S: Final = 5.0
"""A worker that dies sooner is not replaced: it would die again."""
STOP_MARGIN_S: Final = 5.0
_LOOPBACK_OF: Final = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
_MULTIPROC_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"


def run_proxy(config: ProxyConfig) -> int:
    """Run one proxy until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ConfigError: the keys can't be read, or the port can't be had.
    """
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    faulthandler.enable()  # a watchdog's SIGABRT leaves the stacks of all threads in the log
    keys = read_keys(Path(config.keys_file)) if config.keys_file else ()
    with listen(config) as listening:
        _announce(config, listening)
        if config.workers == 1:
            _run_alone(config, Access(keys, UsageBoard(len(keys))), listening)
            return EXIT_OK
        return _Supervisor(config, keys, listening).run()


def _run_alone(config: ProxyConfig, access: Access, listening: socket.socket) -> None:
    from kvrelay.openai_proxy.worker import run_worker

    pulse = _make_pulse(config, lambda: 0.0)
    companion = partial(keep_pulse, pulse) if pulse.notifier.is_heard else None
    run_worker(config, access, listening, companion, partial(_say_stopping, config, pulse))


def _make_pulse(config: ProxyConfig, stuck_for_s: Callable[[], float]) -> Pulse:
    return Pulse(Notifier.from_environment(), stuck_for_s, lambda: f"routers: {', '.join(config.routers)}")


def _say_stopping(config: ProxyConfig, pulse: Pulse) -> None:
    pulse.notifier.stopping("draining", config.drain_timeout_s + 2 * STOP_MARGIN_S)


def _announce(config: ProxyConfig, listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    reachable = _LOOPBACK_OF.get(config.host, config.host)
    logger.info("ready http=%s:%d routers=%s", config.host, port, ",".join(config.routers))
    if config.ready_file:
        facts: dict[str, str | int] = {
            "pid": os.getpid(),
            "role": "proxy",
            "http_address": f"{reachable}:{port}",
        }
        write_ready_file(Path(config.ready_file), facts)


class _Supervisor:
    """Keeps `workers` processes alive. They are forked before anything has started a thread, so that they
    share the listening socket and the usage board."""

    def __init__(self, config: ProxyConfig, keys: tuple[ApiKey, ...], listening: socket.socket) -> None:
        self._config = config
        self._keys = keys
        self._listening = listening
        self._board = UsageBoard(len(keys), config.workers)
        self._life = LifeBoard(config.workers)
        self._pulse = _make_pulse(config, self._life.stuck_for_s)
        self._workers: dict[int, tuple[BaseProcess, float]] = {}
        self._pid = os.getpid()
        self._is_stopping = False
        self._wake_reader, self._wake_writer = socket.socketpair()

    def run(self) -> int:
        """Until told to stop, or until a worker can't stay alive; returns the exit status."""
        os.environ[_MULTIPROC_VARIABLE] = tempfile.mkdtemp(prefix="kvrelay-proxy-metrics-")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            for worker in range(self._config.workers):
                self._start(worker)
            is_well = self._watch()
            self._stop()
            return EXIT_OK if is_well else EXIT_FAILED
        finally:
            shutil.rmtree(os.environ[_MULTIPROC_VARIABLE], ignore_errors=True)

    def _on_signal(self, number: int, frame: object) -> None:
        self._is_stopping = True
        self._wake_writer.send(b"x")

    def _watch(self) -> bool:
        """Replace workers that die. False: one dies as soon as it is started."""
        interval_s = self._pulse.interval_s if self._pulse.notifier.is_heard else None
        while not self._is_stopping:
            sentinels = [process.sentinel for process, _ in self._workers.values()]
            wait([self._wake_reader, *sentinels], interval_s)
            self._beat()
            for worker, (process, started_s) in list(self._workers.items()):
                if self._is_stopping or process.is_alive():
                    continue
                logger.error("worker=%d pid=%s died exit=%s", worker, process.pid, process.exitcode)
                self._forget_figures(process.pid)
                self._life.forget(worker)
                if time.monotonic() - started_s < MIN_LIFE_S:
                    return False
                self._start(worker)
        return True

    def _beat(self) -> None:
        if self._life.are_all_ready and not self._pulse.is_ready:
            self._pulse.ready()
        else:
            self._pulse.beat()

    def _start(self, worker: int) -> None:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=self._work, args=(worker,), name=f"kvrelay proxy worker {worker}")
        process.start()
        self._workers[worker] = (process, time.monotonic())

    def _work(self, worker: int) -> None:
        """In the new process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        die_with(self._pid, signal.SIGTERM)
        from kvrelay.openai_proxy.worker import run_worker

        board = UsageBoard(len(self._keys), self._config.workers, worker, self._board.shared)
        is_heard, interval_s = self._pulse.notifier.is_heard, self._pulse.interval_s
        companion = partial(keep_board, self._life, worker, interval_s) if is_heard else None
        run_worker(self._config, Access(self._keys, board), self._listening, companion)
        sys.exit(EXIT_OK)

    def _stop(self) -> None:
        _say_stopping(self._config, self._pulse)
        self._listening.close()  # Once the workers have too, callers are sent to another proxy.
        processes = [process for process, _ in self._workers.values()]
        for process in processes:
            process.terminate()
        until_s = time.monotonic() + self._config.drain_timeout_s + STOP_MARGIN_S
        for process in processes:
            process.join(max(0.0, until_s - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()

    def _forget_figures(self, pid: int | None) -> None:
        """A dead worker no longer has requests under way; what it counted stays."""
        if pid is not None:
            for file in Path(os.environ[_MULTIPROC_VARIABLE]).glob(f"gauge_live*_{pid}.db"):
                file.unlink(missing_ok=True)
