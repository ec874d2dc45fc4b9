"""Control connections of KV transfer: sockets of bytes over streams of the virtual network."""

from __future__ import annotations

import errno
import selectors
import socket
from collections.abc import Callable
from typing import Any, cast

from kvrelay.simulator.faults.network import End, Network
from kvrelay.simulator.faults.process import Process

Notify = Callable[["SimSocket", int], None]


class SimSocket:
    """As much of `socket.socket` as KV transfer uses. `notify` is told when it may be read or written."""

    def __init__(self, notify: Notify, end: End | None = None) -> None:
        self._notify = notify
        self._end: End | None = None
        self._received = bytearray()
        self._is_at_end = False
        self._error = 0
        self._is_closed = False
        self.accepted: list[SimSocket] = []
        self.on_close: Callable[[], None] | None = None
        if end is not None:
            self.open(end)

    @property
    def is_readable(self) -> bool:
        """Whether `recv` or `accept` would give something."""
        return bool(self._received or self.accepted) or self._is_at_end

    @property
    def is_writable(self) -> bool:
        """Whether it is connected, or will never be."""
        return self._end is not None or self._error != 0

    def open(self, end: End) -> None:
        """It is connected."""
        if self._is_closed:
            end.close()
            return
        self._end = end
        end.on_message = self._on_message
        end.on_lost = lambda _reason: self._on_lost()
        self._notify(self, selectors.EVENT_WRITE)

    def fail(self, code: int) -> None:
        """It can't be connected."""
        self._error = code
        self._notify(self, selectors.EVENT_WRITE)

    def _on_message(self, received: bytes) -> None:
        self._received += received
        self._notify(self, selectors.EVENT_READ)

    def _on_lost(self) -> None:
        self._is_at_end = True
        self._notify(self, selectors.EVENT_READ)

    # ---- socket.socket -----------------------------------------------------------------------------

    def setblocking(self, _flag: bool) -> None:
        """It never blocks."""

    def setsockopt(self, *_arguments: int) -> None:
        """There is nothing to set."""

    def getsockopt(self, *_arguments: int) -> int:
        """Why it could not connect; 0: it could."""
        return self._error

    def getsockname(self) -> tuple[str, int]:
        """An address; the port is always the same."""
        return "127.0.0.1", PORT

    def getpeername(self) -> tuple[str, int]:
        """See `getsockname`."""
        raise OSError(errno.ENOTCONN, "its peer has no name")

    def send(self, data: bytes | bytearray) -> int:
        """Takes all of it."""
        if self._is_closed or self._end is None or not self._end.is_open:
            raise OSError(errno.EPIPE, "broken pipe")
        self._end.send(bytes(data))
        return len(data)

    def recv(self, num_bytes: int) -> bytes:
        """What has come; nothing at the stream's end."""
        if not self._received:
            if self._is_at_end:
                return b""
            raise BlockingIOError
        taken = bytes(self._received[:num_bytes])
        del self._received[:num_bytes]
        return taken

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection."""
        if not self.accepted:
            raise BlockingIOError
        return as_socket(self.accepted.pop(0)), ("peer", 0)

    def shutdown(self, _how: int) -> None:
        """The stream is over, both ways."""
        self._is_at_end = True
        self._notify(self, selectors.EVENT_READ)

    def close(self) -> None:
        """Nothing more comes."""
        self._is_closed = True
        if self._end is not None:
            self._end.close()
        if self.on_close is not None:
            self.on_close()


PORT = 9000


def as_socket(sock: SimSocket) -> socket.socket:
    """For those who take a socket and use no more of it than `SimSocket` has."""
    return cast("socket.socket", sock)


class SimSockets:
    """See `kvrelay.kv_transfer.sockets.Sockets`. `address_of` gives the virtual address of a host."""

    def __init__(
        self, process: Process, network: Network, notify: Notify, address_of: Callable[[str], str]
    ) -> None:
        self._process = process
        self._network = network
        self._notify = notify
        self._address_of = address_of

    def dial(self, host: str, port: int) -> socket.socket:
        """See `Sockets`."""
        sock = SimSocket(self._notify)
        self._network.dial(
            self._process, self._address_of(host), sock.open, lambda _reason: sock.fail(errno.ECONNREFUSED)
        )
        return as_socket(sock)

    def listen(self, host: str, port: int) -> socket.socket:
        """See `Sockets`."""
        sock, address = SimSocket(self._notify), self._address_of(host)

        def on_connection(end: End) -> None:
            sock.accepted.append(SimSocket(self._notify, end))
            self._notify(sock, selectors.EVENT_READ)

        self._network.listen(address, self._process, on_connection)
        sock.on_close = lambda: self._network.unlisten(address)
        return as_socket(sock)
