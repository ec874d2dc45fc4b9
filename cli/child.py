"""One service of a local cluster as a child process: its log, its ready file, its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvrelay.core.errors import KVRelayError
from kvrelay.node.parent_death import PARENT_VARIABLE

_OWN_VARIABLES: Final = ("KVRELAY_CONFIG", "KVRELAY_ROUTER")
_POLL_S: Final = 0.03
_TAIL_BYTES: Final = 8192
_REAP_TIMEOUT_S: Final = 10.0


class ChildDiedError(KVRelayError):
    """A service ended though nobody had asked it to; the message has the end of its log."""


@dataclass(slots=True)
class Child:
    """A running (or ended) service. `facts` is what its ready file says, once it is there."""

    name: str
    process: asyncio.subprocess.Process
    log_file: Path
    ready_file: Path
    facts: dict[str, str | int]

    @property
    def is_running(self) -> bool:
        return self.process.returncode is None

    async def wait_ready(self) -> None:
        """Return when the ready file is there. Never ends if the process has died: watch `wait_died` too."""
        while not self.ready_file.exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(_POLL_S)
        self.facts = json.loads(self.ready_file.read_text())

    async def wait_died(self) -> None:
        """Wait for the process's end.

        Raises:
            ChildDiedError: always, when it comes.
        """
        code = await self.process.wait()
        raise ChildDiedError(self.describe_end(code))

    def describe_end(self, code: int) -> str:
        """Who ended how, and its last words."""
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit status {code}"
        lines = "\n".join(f"    {line}" for line in last_lines(self.log_file, 15)) or "    (its log is empty)"
        return f"{self.name} (pid {self.process.pid}) {how}; the end of {self.log_file}:\n{lines}"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; a process that is gone is left alone."""
        if self.is_running:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)

    async def wait_gone(self, timeout_s: float) -> None:
        """Wait until the process is gone and reaped; one that takes longer than `timeout_s` is killed."""
        try:
            await asyncio.wait_for(self.process.wait(), timeout_s)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await asyncio.wait_for(self.process.wait(), _REAP_TIMEOUT_S)


async def start_child(name: str, arguments: Sequence[str], folder: Path) -> Child:
    """Start ``kvrelay ARGUMENTS`` with its log and ready file in `folder`.

    It leads its own process group, so that Ctrl-C reaches only us and we stop it in order; and it dies with
    us (`parent_death`).
    """
    log_file, ready_file = folder / f"{name}.log", folder / f"{name}.ready.json"
    ready_file.unlink(missing_ok=True)
    environ = {
        key: value for key, value in os.environ.items() if key not in ("KVRELAY_CONFIG", "KVRELAY_ROUTER")
    }
    environ[PARENT_VARIABLE] = str(os.getpid())
    with log_file.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "kvrelay.cli",
            *arguments,
            "--ready-file",
            str(ready_file),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environ,
            start_new_session=True,
        )
    return Child(name, process, log_file, ready_file, {})


def last_lines(file: Path, count: int) -> list[str]:
    """The last non-empty lines of a text file; none if it can't be read."""
    try:
        with file.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - _TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
