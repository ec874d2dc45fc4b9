"""Cgroups of one's own for every host, below the caller's, whose limits go on to hold."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/sys/fs/cgroup")
_UNIFIED: Final = "unified"
_KILL_TIMEOUT_S: Final = 20.0


def name_of(host: str) -> str:
    """What the cgroup of a host is called."""
    return f"kvrelay-host-{host}"


def make(name: str) -> list[Path]:
    """A cgroup called `name` in every hierarchy; the unified one comes last."""
    made = sorted(_own(name), key=lambda folder: _UNIFIED in folder.parts or folder.parent == _ROOT)
    for folder in made:
        folder.mkdir(parents=True, exist_ok=True)
    return made


def kill(name: str) -> None:
    """SIGKILL to all that runs in that cgroup and below it, until nothing does."""
    until_s = time.monotonic() + _KILL_TIMEOUT_S
    while pids := {pid for folder in _own(name) for pid in _processes(folder)}:
        if time.monotonic() > until_s:
            raise TimeoutError(f"processes of cgroup {name} survived SIGKILL: {sorted(pids)}")
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def remove(name: str) -> None:
    """Remove that cgroup and all below it, from every hierarchy."""
    for top in _own(name):
        for folder, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):
                os.rmdir(folder)


def _own(name: str) -> Iterator[Path]:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        folder = controllers.removeprefix("name=")
        if folder == "cpuset":
            continue  # of the old kind: takes no process before it has been given processors
        if not folder:
            folder = _UNIFIED if (_ROOT / _UNIFIED).is_dir() else "."
        if (_ROOT / folder).is_dir():
            yield _ROOT / folder / path.strip("/") / name


def _processes(top: Path) -> Iterator[int]:
    for folder, _, _ in os.walk(top):
        with suppress(OSError):
            yield from map(int, (Path(folder) / "cgroup.procs").read_text().split())
