"""What a service tells systemd: that it is ready, alive or on its way out; and what it must not hide."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvrelay.node.pulse import Pulse
from kvrelay.node.sd_notify import Notifier


@dataclass
class Manager:
    """Stands in for systemd: `heard` takes what has come so far, a dict for each datagram."""

    address: str
    listening: socket.socket

    def heard(self) -> list[dict[str, str]]:
        messages = []
        while True:
            try:
                lines = self.listening.recv(4096).decode().splitlines()
            except BlockingIOError:
                return messages
            messages.append(dict(line.split("=", 1) for line in lines))


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path: Path) -> Iterator[Manager]:
    name = (
        str(tmp_path / "notify") if request.param == "path" else f"@kvrelay-test-{os.getpid()}-{id(request)}"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.setblocking(False)
        listening.bind(name.replace("@", "\0", 1))
        yield Manager(name, listening)


def test_a_service_says_when_it_is_ready_and_when_it_stops(manager: Manager) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": manager.address})
    notifier.extend("loading: 10 % of a model", 600)
    notifier.ready("serving")
    notifier.stopping("draining", 42.5)
    assert manager.heard() == [
        {"STATUS": "loading: 10 % of a model", "EXTEND_TIMEOUT_USEC": "600000000"},
        {"READY": "1", "STATUS": "serving"},
        {"STOPPING": "1", "STATUS": "draining", "EXTEND_TIMEOUT_USEC": "42500000"},
    ]


def test_a_status_is_one_line_whatever_it_is_made_of(manager: Manager) -> None:
    Notifier(manager.address).ready("a\nREADY=0\nb" + "c" * 10_000)
    (message,) = manager.heard()
    assert message["READY"] == "1"
    assert message["STATUS"].startswith("a READY=0 bccc")
    assert len(message["STATUS"]) == 200


def test_without_a_manager_nothing_is_said_and_nothing_fails(tmp_path: Path) -> None:
    assert not Notifier.from_environment({}).is_heard
    Notifier().ready("serving")
    Notifier(str(tmp_path / "gone")).ready("serving")


@pytest.mark.parametrize(
    ("environ", "watchdog_s"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_the_one_meant_for_this_process(environ, watchdog_s) -> None:
    assert Notifier.from_environment({"NOTIFY_SOCKET": "/run/x", **environ}).watchdog_s == watchdog_s


def test_a_pulse_extends_the_start_until_ready_and_then_pets(manager: Manager) -> None:
    pulse = Pulse(Notifier(manager.address, 30.0), lambda: 0.0, lambda: "well")
    pulse.beat()
    pulse.ready()
    pulse.beat()
    assert [sorted(message) for message in manager.heard()] == [
        ["EXTEND_TIMEOUT_USEC", "STATUS"],
        ["READY", "STATUS"],
        ["STATUS", "WATCHDOG"],
    ]


def test_what_stands_still_for_half_of_the_watchdogs_time_is_not_petted(manager: Manager) -> None:
    stuck_s = 14.9
    pulse = Pulse(Notifier(manager.address, 30.0), lambda: stuck_s, lambda: "well")
    pulse.ready()
    pulse.beat()
    stuck_s = 15.1
    pulse.beat()
    pulse.beat()
    assert sum("WATCHDOG" in message for message in manager.heard()) == 1
    stuck_s = 0.0
    pulse.beat()
    assert [message["WATCHDOG"] for message in manager.heard()] == ["1"]


def test_without_a_watchdog_only_news_is_told(manager: Manager) -> None:
    status = "one request"
    pulse = Pulse(Notifier(manager.address), lambda: 1e9, lambda: status)
    pulse.ready()
    pulse.beat()
    status = "no request"
    pulse.beat()
    assert manager.heard() == [{"READY": "1", "STATUS": "one request"}, {"STATUS": "no request"}]


async def test_a_pulse_beats_several_times_within_the_watchdogs_time(manager: Manager) -> None:
    pulse = Pulse(Notifier(manager.address, 0.04), lambda: 0.0, lambda: "well")
    pulse.ready()
    beating = asyncio.create_task(pulse.run())
    await asyncio.get_running_loop().sock_recv(manager.listening, 4096)
    for _ in range(3):
        assert b"WATCHDOG=1" in await asyncio.get_running_loop().sock_recv(manager.listening, 4096)
    assert pulse.interval_s == 0.01
    beating.cancel()


async def test_a_pulse_that_nobody_hears_ends_at_once() -> None:
    await Pulse(Notifier(), lambda: 0.0, lambda: "well").run()
