"""The loop of the transfer thread: what ends its pauses, and when it makes none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from kvrelay.kv_transfer import reactor as reactor_module
from kvrelay.kv_transfer.reactor import Reactor

TIMEOUT_S = 20.0
FOR_EVER_S = 3600.0


class Poller:
    """A client that always asks to be polled; `on_turn` is called in every turn."""

    def __init__(self, spin_s: float, on_turn: Callable[[int], None]) -> None:
        self._spin_s = spin_s
        self._on_turn = on_turn
        self.num_turns = 0

    def begin(self) -> None:
        return

    def turn(self, now_s: float) -> bool:
        self.num_turns += 1
        self._on_turn(self.num_turns)
        return False

    def is_polling(self, now_s: float) -> bool:
        return True

    def spin_s(self) -> float:
        return self._spin_s

    def wait_s(self, now_s: float) -> float | None:
        return None

    def end(self) -> None:
        return

    def crashed(self, error: BaseException) -> None:
        raise error


@pytest.fixture(autouse=True)
def endless_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever pauses without being woken fails by its test's deadline."""
    monkeypatch.setattr(reactor_module, "_FIRST_PAUSE_S", FOR_EVER_S)
    monkeypatch.setattr(reactor_module, "_MAX_PAUSE_S", FOR_EVER_S)


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = Reactor("test")
    yield made
    stopped = threading.Event()
    made.stop(stopped.set)
    assert stopped.wait(TIMEOUT_S)
    made.join()


def run(reactor: Reactor, spin_s: float, until_turn: int) -> threading.Event:
    """Start a client; the event is set when its turn of that number has come."""
    reached = threading.Event()

    def on_turn(number: int) -> None:
        if number == until_turn:
            reached.set()

    reactor.start(Poller(spin_s, on_turn), lambda error: None)
    return reached


def test_a_client_that_is_in_a_hurry_is_polled_without_pauses(reactor: Reactor) -> None:
    reached = run(reactor, FOR_EVER_S, 10 * reactor_module._PAUSELESS_POLLS)
    assert reached.wait(TIMEOUT_S)


def test_a_command_ends_a_pause(reactor: Reactor) -> None:
    reached = run(reactor, 0.0, reactor_module._PAUSELESS_POLLS)
    assert reached.wait(TIMEOUT_S)  # it pauses now, or is about to
    for _ in range(3):
        ran = threading.Event()
        reactor.post(ran.set)
        assert ran.wait(TIMEOUT_S)


def test_a_socket_ends_a_pause(reactor: Reactor) -> None:
    mine, theirs = socket.socketpair()
    heard = threading.Event()

    def on_ready(_events: int) -> None:
        mine.recv(16)
        heard.set()

    with mine, theirs:
        mine.setblocking(False)
        reactor.watch(mine, 1, on_ready)
        reached = run(reactor, 0.0, reactor_module._PAUSELESS_POLLS)
        assert reached.wait(TIMEOUT_S)
        for _ in range(3):
            heard.clear()
            theirs.send(b"x")
            assert heard.wait(TIMEOUT_S)
        reactor.unwatch(mine)
