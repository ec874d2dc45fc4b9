"""A cluster in which everything is there twice, of processes that can be restarted one by one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.cluster.conftest import CLI, REPOSITORY, ServiceProcess

_INHERITED_FD: Final = 3
_EXIT_TIMEOUT_S: Final = 120.0


@dataclass
class Replica:
    """One service that comes back under the same name and address. `listening` is handed to it as a service
    manager would, and stays open while it restarts."""

    name: str
    arguments: list[str]
    folder: Path
    listening: socket.socket | None = None
    process: ServiceProcess | None = None
    module: str = CLI

    def start(self) -> None:
        """Returns once it says that it is ready."""
        ready_file, log_file = self.folder / f"{self.name}.ready.json", self.folder / f"{self.name}.log"
        ready_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", self.module, *self.arguments, "--ready-file", str(ready_file)]
        with log_file.open("ab") as log:
            popen = subprocess.Popen(
                _inheriting(command) if self.listening else command,
                stdin=self.listening,  # the shell moves it to where it belongs
                stdout=log,
                stderr=log,
                cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.process = ServiceProcess(self.name, popen, ready_file, log_file)
        self.process.wait_ready()

    def restart(self) -> None:
        """SIGTERM; when it has left in peace, start it anew."""
        assert self.process is not None
        self.process.popen.send_signal(signal.SIGTERM)
        code = self.process.popen.wait(_EXIT_TIMEOUT_S)
        assert code == 0, f"{self.name} left with exit status {code}:\n{self.process.log()}"
        self.start()

    @property
    def ready(self) -> dict[str, str]:
        assert self.process is not None
        return self.process.ready


def _inheriting(command: Sequence[str]) -> list[str]:
    """The command with its stdin as the inherited socket. Source: sd_listen_fds(3)."""
    script = f'exec {_INHERITED_FD}<&0 0</dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
    return ["sh", "-c", script, "sh", *command]


@dataclass
class ReplicatedCluster:
    """Two routers, two prefill nodes, two decode nodes, one proxy; `replicas` in the order of starting."""

    folder: Path
    node_arguments: Sequence[str]
    replicas: list[Replica] = field(default_factory=list)

    @property
    def routers(self) -> list[str]:
        """Their gRPC addresses."""
        return [replica.ready["grpc_address"] for replica in self.replicas[:2]]

    @property
    def base_url(self) -> str:
        """The proxy's."""
        return f"http://{self.replicas[-1].ready['http_address']}/v1"

    def start(self) -> None:
        """Returns once every service says that it is ready."""
        for name in ("router-a", "router-b"):
            self._add(name, ["router", "--host", "127.0.0.1", "--port", "0", "--http-port", "0"])
            # It comes back at the same address.
            port = self.replicas[-1].ready["grpc_address"].rpartition(":")[2]
            self.replicas[-1].arguments += ["--port", port]
        to_routers = [word for address in self.routers for word in ("--router", address)]
        for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
            role = name.partition("-")[0]
            self._add(name, [role, "--node-id", name, *to_routers, *self.node_arguments])
        listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self._add("proxy", ["proxy", "--host", "127.0.0.1", *to_routers], listening)

    def _add(self, name: str, arguments: list[str], listening: socket.socket | None = None) -> None:
        replica = Replica(name, arguments, self.folder, listening)
        self.replicas.append(replica)
        replica.start()

    async def restart_each(self) -> None:
        """The rolling restart: one at a time, each after the one before is ready."""
        for replica in [*self.replicas[2:6], *self.replicas[:2], self.replicas[6]]:
            await asyncio.to_thread(replica.restart)

    def stop(self) -> None:
        """End every process that is left."""
        for replica in reversed(self.replicas):
            if replica.process is not None:
                replica.process.stop()
            if replica.listening is not None:
                replica.listening.close()
