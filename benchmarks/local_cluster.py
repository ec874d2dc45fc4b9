"""A cluster of real processes on this machine, for benchmarks: started, waited for, stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 180.0


class StartFailed(SystemExit):
    """A service did not start; ends the program with the log's end, unless it is caught."""


@dataclass(frozen=True)
class LocalService:
    """One running service and what its ready file says."""

    role: str
    pid: int
    ready: dict[str, str]


@contextmanager
def running_service(
    role: str,
    args: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    log_folder: Path | None = None,
    module: str = "kvrelay.cli",
) -> Iterator[LocalService]:
    """`kvrelay <role> <args>` until the block ends, its log in ``log_folder/role.log`` if that is wanted;
    `module` may be another than kvrelay's command line.

    Raises:
        StartFailed: it ended, or was not ready within `START_TIMEOUT_S`.
    """
    with tempfile.TemporaryDirectory() as folder:
        ready_file, log_file = Path(folder) / "ready.json", (log_folder or Path(folder)) / f"{role}.log"
        command = [sys.executable, "-m", module, role, *args, "--ready-file", str(ready_file)]
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                command, env={**os.environ, **(env or {})}, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        try:
            wait_for_file(ready_file, process, log_file)
            yield LocalService(role, process.pid, json.loads(ready_file.read_text()))
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for_file(path: Path, process: subprocess.Popen[bytes], log_file: Path) -> None:
    """Until `path` exists; `StartFailed` if the process dies before."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise StartFailed(f"a service did not start:\n{log_file.read_text(errors='replace')[-2000:]}")
        time.sleep(0.02)


@contextmanager
def running_cluster(
    num_prefill: int,
    num_decode: int,
    node_args: Sequence[str],
    router_args: Sequence[str] = (),
    *,
    router_module: str = "kvrelay.cli",
) -> Iterator[tuple[str, list[LocalService]]]:
    """Router and nodes; yields the router's gRPC address and all services, the router first."""
    router_args = ["--host", "127.0.0.1", "--port", "0", "--http-port", "0", *router_args]
    with ExitStack() as stack:
        router = stack.enter_context(running_service("router", router_args, module=router_module))
        address = router.ready["grpc_address"]
        services = [router]
        for role, count in (("prefill", num_prefill), ("decode", num_decode)):
            for index in range(count):
                args = ["--router", address, "--node-id", f"{role}-{index}", *node_args]
                services.append(stack.enter_context(running_service(role, args)))
        yield address, services
