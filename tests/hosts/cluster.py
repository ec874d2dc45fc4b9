"""The cluster on three hosts, as somebody sees it who has a shell there and an HTTP client elsewhere."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tests.hosts.host import Host

PATIENCE_S: Final = 240.0
_POLL_S: Final = 0.2
PROMPT: Final = "What is the capital of France?"


@dataclass
class Cluster:
    """Router and proxy on `front`, one node on each of the others."""

    front: Host
    prefill: Host
    decode: Host

    @property
    def hosts(self) -> tuple[Host, Host, Host]:
        return self.front, self.prefill, self.decode

    def ask(self, **fields: object) -> str:
        """The answer to `PROMPT`, through the proxy, by curl, from outside of all hosts.

        Raises:
            AssertionError: there was none.
        """
        done = self.start_asking(**fields)
        output, errors = done.communicate(timeout=PATIENCE_S)
        return answer_in(output, errors)

    def start_asking(self, **fields: object) -> subprocess.Popen[str]:
        """The same, without waiting for it; see `answer_in`."""
        body = {
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": 24,
            "temperature": 0,
            **fields,
        }
        url = f"http://{self.front.address}:8000/v1/chat/completions"
        command = ["curl", "--silent", "--show-error", "--max-time", "120", url]
        return subprocess.Popen(
            [*command, "--header", "content-type: application/json", "--data", json.dumps(body)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def status(self) -> dict[str, Any]:
        """What `kvrelay status --json` says on the router's host."""
        said: dict[str, Any] = json.loads(self.front.run("/opt/kvrelay/bin/kvrelay status --json"))
        return said

    def wait_nodes(self, num_nodes: int) -> None:
        """Until the router sees that many."""
        wait_until(lambda: len(self._nodes()) == num_nodes, f"the router sees {num_nodes} nodes")

    def _nodes(self) -> list[Any]:
        ready = self.front.succeeds("/opt/kvrelay/bin/kvrelay status --json >/run/status.json")
        return json.loads(self.front.run("cat /run/status.json"))["nodes"] if ready else []


def answer_in(output: str, errors: str = "") -> str:
    """The text in a chat completion."""
    try:
        return str(json.loads(output)["choices"][0]["message"]["content"])
    except (ValueError, KeyError, IndexError):
        raise AssertionError(f"no answer: {output[:500]} {errors}") from None


def wait_active(host: Host, unit: str) -> None:
    """Until systemd says that a service is ready.

    Raises:
        AssertionError: it takes too long, or systemd has given it up; has the unit's journal then.
    """
    wait_until(
        lambda: host.succeeds(f"systemctl is-active {unit} || systemctl is-failed {unit}"),
        f"{unit} is active or given up on {host.name}",
    )
    if not host.succeeds(f"systemctl is-active {unit}"):
        log = f"systemctl status --no-pager --full {unit}; journalctl --no-pager -n 60 -u {unit}; true"
        raise AssertionError(f"{unit} on {host.name}:\n{host.run(log)}")


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    """Poll what another host does."""
    until_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < until_s, f"not within {PATIENCE_S:g} s: {what}"
        time.sleep(_POLL_S)


def property_of(host: Host, unit: str, name: str) -> str:
    """What `systemctl show` says of a unit."""
    return host.run(f"systemctl show --value --property={name} {unit}").strip()
