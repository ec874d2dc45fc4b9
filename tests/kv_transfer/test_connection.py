"""How a control connection tells of its end."""

from __future__ import annotations

import selectors
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvrelay.core.errors import KVRelayError
from kvrelay.core.ids import AttemptId, TransferId
from kvrelay.kv_transfer.connection import _MAX_UNSENT_BYTES, Connection
from kvrelay.kv_transfer.frame_reader import frame_bytes
from kvrelay.kv_transfer.messages import Abort, Ping, Pong

TIMEOUT_S = 20.0


class OneSelector:
    """A `Watcher` whose callbacks run in `step`."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()

    def watch(self, sock: socket.socket, events: int, callback: Callable[[int], None]) -> None:
        if sock in self.selector.get_map():
            self.selector.modify(sock, events, callback)
        else:
            self.selector.register(sock, events, callback)

    def unwatch(self, sock: socket.socket) -> None:
        self.selector.unregister(sock)

    def step(self) -> None:
        ready = self.selector.select(TIMEOUT_S)
        assert ready, "nothing came"
        for key, events in ready:
            key.data(events)


@dataclass
class Ends:
    connection: Connection
    peer: socket.socket
    watcher: OneSelector
    frames: list[Any] = field(default_factory=list)
    losses: list[KVRelayError] = field(default_factory=list)

    def until_lost(self) -> KVRelayError:
        while not self.losses:
            self.watcher.step()
        (loss,) = self.losses
        return loss


@pytest.fixture
def ends() -> Iterator[Ends]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    watcher = OneSelector()
    frames: list[Any] = []
    losses: list[KVRelayError] = []
    connection = Connection(
        sock, watcher, lambda: 0.0, on_frame=frames.append, on_lost=losses.append, is_connecting=False
    )
    yield Ends(connection, peer, watcher, frames, losses)
    connection.close()
    peer.close()
    watcher.selector.close()


def test_sending_to_a_peer_that_is_gone_tells_of_it_later(ends: Ends) -> None:
    ends.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ends.peer.close()
    for _ in range(10):
        ends.connection.send(Ping(), Ping())
        assert ends.losses == []
    assert "connection" in str(ends.until_lost())


def test_what_a_peer_said_last_is_heard_before_its_loss(ends: Ends) -> None:
    last = Abort(TransferId(1, AttemptId(1)), "TRANSFER_FAILED", "out of memory")
    ends.peer.sendall(frame_bytes(last))
    ends.peer.close()
    for _ in range(10):
        ends.connection.send(Pong())
    ends.until_lost()
    assert ends.frames == [last]


def test_a_peer_that_does_not_read_is_lost_by_name(ends: Ends) -> None:
    long = Abort(TransferId(1, AttemptId(1)), "TRANSFER_FAILED", "x" * 2000)
    for _ in range(4 * _MAX_UNSENT_BYTES // 2000):
        ends.connection.send(long)
    assert ends.losses == []
    assert "does not read" in str(ends.until_lost())
