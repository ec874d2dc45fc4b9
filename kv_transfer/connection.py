"""One control connection: frames in and out of a non-blocking socket."""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from kvrelay.core.errors import KVRelayError, TransferCorrupt, TransferFailed
from kvrelay.kv_transfer.frame_reader import FrameReader, frame_bytes
from kvrelay.kv_transfer.messages import Frame, Ping
from kvrelay.kv_transfer.transport import Watcher

_MAX_UNSENT_BYTES: Final = 4 << 20
_READ_BYTES: Final = 64 * 1024
_MAX_READS_A_TURN: Final = 16


class Connection:
    """Owns the socket, which may still be connecting.

    `on_frame` gets every frame; a `KVRelayError` that it raises ends the connection. `on_lost` is called
    once when the connection ends by itself, never after `close`. Both are called by the watcher alone:
    whoever sends is in the midst of something.
    """

    def __init__(
        self,
        sock: socket.socket,
        watcher: Watcher,
        clock: Callable[[], float],
        *,
        on_frame: Callable[[Frame], None],
        on_lost: Callable[[KVRelayError], None],
        is_connecting: bool,
    ) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._watcher = watcher
        self._clock = clock
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._is_connecting = is_connecting
        self._is_closed = False
        self._reader = FrameReader()
        self._unsent = bytearray()
        self._pinged_s: float | None = None
        self._watched = 0
        self._send_error: KVRelayError | None = None
        self.last_received_s = clock()
        self._watch()

    def send(self, *frames: Frame) -> None:
        """Send, at once, or keep what the socket does not take now; does nothing once closed."""
        if self._is_closed or self._send_error is not None:
            return
        for frame in frames:
            self._unsent += frame_bytes(frame)
        if len(self._unsent) > _MAX_UNSENT_BYTES:
            self._stop_sending(TransferFailed("the peer does not read its control connection"))
            return
        if not self._is_connecting:
            self._flush()

    def keep_alive(self, now_s: float, interval_s: float) -> None:
        """Ping when the peer was silent for `interval_s`; one ping at a time."""
        if self._pinged_s is None and now_s - self.last_received_s >= interval_s:
            self._pinged_s = now_s
            self.send(Ping())

    def silent_s(self, now_s: float) -> float:
        """How long the peer has owed an answer to a ping."""
        return 0.0 if self._pinged_s is None else now_s - self._pinged_s

    @property
    def is_to_this_host(self) -> bool:
        """Whether both ends have the same address; False when that can't be told."""
        try:
            return bool(self._sock.getsockname()[0] == self._sock.getpeername()[0])
        except OSError:
            return False

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._watcher.unwatch(self._sock)
        self._sock.close()

    def _watch(self) -> None:
        wants_write = self._is_connecting or bool(self._unsent)
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wants_write else 0)
        if events != self._watched:
            self._watched = events
            self._watcher.watch(self._sock, events, self._on_ready)

    def _on_ready(self, events: int) -> None:
        if self._is_closed:
            return
        if events & selectors.EVENT_WRITE:
            self._on_writable()
        if events & selectors.EVENT_READ and not self._is_closed and not self._is_connecting:
            self._receive_all()

    def _on_writable(self) -> None:
        if self._is_connecting:
            error = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self._lose(TransferFailed(f"can't connect: {os.strerror(error)}"))
                return
            self._is_connecting = False
        self._flush()

    def _flush(self) -> None:
        try:
            num_sent = self._sock.send(self._unsent) if self._unsent else 0
        except (BlockingIOError, InterruptedError):
            num_sent = 0
        except OSError as error:
            self._stop_sending(TransferFailed(f"connection lost: {error.strerror}"))
            return
        del self._unsent[:num_sent]
        self._watch()

    def _stop_sending(self, error: KVRelayError) -> None:
        """The watcher finds the end next, behind what the peer may have said last."""
        self._send_error = error
        self._unsent.clear()
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._watch()

    def _receive_all(self) -> None:
        """Read what is there, an end included: a loss must not be noticed later than what it explains."""
        for _ in range(_MAX_READS_A_TURN):
            if self._is_closed or not self._receive():
                return

    def _receive(self) -> bool:
        """Whether there may be more to read."""
        try:
            received = self._sock.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._lose(self._send_error or TransferFailed(f"connection lost: {error.strerror}"))
            return False
        if not received:
            self._lose(self._send_error or TransferFailed("connection closed by the peer"))
            return False
        self.last_received_s = self._clock()
        self._pinged_s = None
        self._deliver(received)
        return True

    def _deliver(self, received: bytes) -> None:
        try:
            for frame in self._reader.feed(received):
                if self._is_closed:
                    return
                self._on_frame(frame)
        except KVRelayError as error:
            self._lose(error)

    def _lose(self, error: KVRelayError) -> None:
        if not self._is_closed:
            self.close()
            self._on_lost(error)


def unexpected(frame: Frame) -> TransferCorrupt:
    """The error for a well-formed frame that has no place where it came."""
    return TransferCorrupt(f"unexpected {type(frame).__name__}")
