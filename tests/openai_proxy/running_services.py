"""`kvrelay` commands as processes of their own, with what they say when they are ready."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

START_TIMEOUT_S: Final = 300.0
STOP_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.05
_UP_IS_READY: Final = re.compile(r"ready: router (\S+) .*\nOpenAI API: (\S+)\n")
_PROXY_IS_READY: Final = re.compile(r" ready http=(\S+) ")


@dataclass(frozen=True)
class RunningUp:
    """A whole cluster with its OpenAI proxy. `log_dir` has a log for each of its processes."""

    router: str
    base_url: str
    log_dir: Path


@contextmanager
def running_up(folder: Path, *arguments: str) -> Iterator[RunningUp]:
    """`kvrelay up` on free ports with one node of each role and a small KV budget, until the block ends."""
    logs = folder / "logs"
    fixed = ("--port", "0", "--proxy-port", "0", "--threads", "1", "--num-blocks", "512")
    command = ["up", *fixed, "--log-dir", str(logs), *arguments]
    with _running(command, folder / "up.log", _UP_IS_READY) as (router, base_url):
        yield RunningUp(router, base_url, logs)


@contextmanager
def running_proxy(log: Path, router: str, *arguments: str) -> Iterator[str]:
    """One more `kvrelay proxy` in front of a router, until the block ends; gives its base URL."""
    fixed = ("--host", "127.0.0.1", "--port", "0", "--router", router)
    with _running(["proxy", *fixed, *arguments], log, _PROXY_IS_READY) as (address,):
        yield f"http://{address}/v1"


@contextmanager
def _running(command: list[str], log: Path, is_ready: re.Pattern[str]) -> Iterator[tuple[str, ...]]:
    """Runs a command and waits until `is_ready` is in its log; gives the pattern's groups."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvrelay.cli", *command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        yield _wait_ready(process, log, is_ready)
        assert process.poll() is None, f"ended by itself:\n{log.read_text()[-4000:]}"
    finally:
        _stop(process)
    assert process.returncode == 0, f"exit status {process.returncode}:\n{log.read_text()[-4000:]}"


def _wait_ready(process: subprocess.Popen[bytes], log: Path, is_ready: re.Pattern[str]) -> tuple[str, ...]:
    until_s = time.monotonic() + START_TIMEOUT_S
    while not (found := is_ready.search(log.read_text())):
        if process.poll() is not None or time.monotonic() > until_s:
            raise AssertionError(f"not ready, exit status {process.returncode}:\n{log.read_text()[-4000:]}")
        time.sleep(_POLL_S)
    return found.groups()


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
