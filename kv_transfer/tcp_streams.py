"""The two ends of one data connection of the tcp transport, non-blocking."""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from struct import Struct
from typing import Final

from kvrelay.core.errors import TransferFailed

_MAGIC: Final = b"kvr1"
TICKET_BYTES: Final = 16
PREFACE_BYTES: Final = len(_MAGIC) + TICKET_BYTES
_HEADER: Final = Struct(">QQQ")
_ANSWER: Final = Struct(">Q")
_WELCOME: Final = 0
_MAX_UNSENT_ANSWERS_BYTES: Final = 64 * 1024
_MAX_BYTES_A_TURN: Final = 16 << 20


class OutgoingStream:
    """The sender's end: connects, shows its ticket, writes messages, reads their answers."""

    def __init__(self, host: str, port: int, ticket: bytes) -> None:
        self.sock = dial(host, port)
        self.is_open = False
        self._connecting = True
        self._unsent: deque[memoryview] = deque([memoryview(_MAGIC + ticket)])
        self._unanswered: deque[int] = deque([_WELCOME])
        self._received = bytearray()

    @property
    def num_unanswered(self) -> int:
        return len(self._unanswered)

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent) or self._connecting

    def enqueue(self, write_id: int, offset: int, source: memoryview) -> None:
        self._unsent.append(memoryview(_HEADER.pack(write_id, offset, len(source))))
        self._unsent.append(source)
        self._unanswered.append(write_id)

    def send(self) -> None:
        """Send what the socket takes."""
        if self._connecting:
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error))
            self._connecting = False
        budget = _MAX_BYTES_A_TURN
        while self._unsent and budget > 0:
            try:
                num_sent = self.sock.sendmsg(list(self._unsent)[:8])
            except (BlockingIOError, InterruptedError):
                return
            budget -= num_sent
            self._forget(num_sent)

    def _forget(self, num_sent: int) -> None:
        while self._unsent and num_sent >= len(self._unsent[0]):
            num_sent -= len(self._unsent.popleft())
        if num_sent:
            self._unsent[0] = self._unsent[0][num_sent:]

    def receive_answers(self) -> list[int]:
        """Ids of writes that have arrived."""
        if self._connecting:
            return []
        try:
            received = self.sock.recv(4096)
        except (BlockingIOError, InterruptedError):
            return []
        if not received:
            raise TransferFailed("closed by the peer")
        self._received += received
        whole = len(self._received) // _ANSWER.size * _ANSWER.size
        answers = [int(answer) for (answer,) in _ANSWER.iter_unpack(self._received[:whole])]
        del self._received[:whole]
        return [answer for answer in answers if self._take_answer(answer)]

    def _take_answer(self, answer: int) -> bool:
        if not self._unanswered or self._unanswered.popleft() != answer:
            raise TransferFailed("the peer answered a write that was not sent")
        self.is_open = True
        return answer != _WELCOME


class IncomingStream:
    """The receiver's end: checks the ticket, places messages where they are allowed, answers each."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._buffer = bytearray(PREFACE_BYTES)
        self._num_filled = 0
        self._staging = memoryview(b"")
        self._may_write: Callable[[int, int], bool] = lambda _offset, _num_bytes: False
        self._write_id = self._offset = self._num_bytes = 0
        self._target: memoryview | None = None
        self._unsent = bytearray()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def receive_preface(self) -> bytes | None:
        """The whole preface, None while it is incomplete."""
        if not self._fill():
            return None
        return bytes(self._buffer)

    def ticket_of(self, preface: bytes) -> bytes:
        """The ticket shown, empty when the preface is not ours."""
        return preface[len(_MAGIC) :] if preface.startswith(_MAGIC) else b""

    def begin(self, staging: memoryview, may_write: Callable[[int, int], bool]) -> None:
        """The ticket was good: from now on messages go into `staging`."""
        self._staging = staging
        self._may_write = may_write
        self._expect_header()
        self._answer(_WELCOME)

    def receive(self) -> None:
        """Take what has arrived.

        Raises:
            TransferFailed: the peer closed, or wrote where it may not.
        """
        budget = _MAX_BYTES_A_TURN
        while budget > 0:
            if self._target is None:
                if not self._fill():
                    return
                self._begin_message()
                continue
            # Asked again for each part: the peer may have given the slot back in the midst of its message,
            # and another one may have it by now.
            self._check_granted()
            if not (num_received := self._receive_into(self._target)):
                return
            budget -= num_received
            self._target = self._target[num_received:]
            if self._target is not None and not self._target:
                self._answer(self._write_id)
                self._expect_header()

    def _begin_message(self) -> None:
        self._write_id, self._offset, self._num_bytes = _HEADER.unpack(self._buffer)
        self._check_granted()
        self._target = self._staging[self._offset : self._offset + self._num_bytes]

    def _check_granted(self) -> None:
        if not self._may_write(self._offset, self._num_bytes):
            raise TransferFailed(
                f"a write of {self._num_bytes} bytes at {self._offset} that was not granted, or not any more"
            )

    def _expect_header(self) -> None:
        self._target = None
        self._buffer = bytearray(_HEADER.size)
        self._num_filled = 0

    def _fill(self) -> bool:
        view = memoryview(self._buffer)
        while self._num_filled < len(view):
            num_received = self._receive_into(view[self._num_filled :])
            if not num_received:
                return False
            self._num_filled += num_received
        return True

    def _receive_into(self, target: memoryview) -> int:
        """Bytes received, 0 when there are none now."""
        try:
            num_received = self.sock.recv_into(target)
        except (BlockingIOError, InterruptedError):
            return 0
        if num_received == 0:
            raise TransferFailed("closed by the peer")
        return num_received

    def _answer(self, write_id: int) -> None:
        self._unsent += _ANSWER.pack(write_id)
        if len(self._unsent) > _MAX_UNSENT_ANSWERS_BYTES:
            raise TransferFailed("the peer reads no answers")
        self.send_answers()

    def send_answers(self) -> None:
        if not self._unsent:
            return
        try:
            num_sent = self.sock.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            return
        del self._unsent[:num_sent]


def dial(host: str, port: int) -> socket.socket:
    """A non-blocking socket that connects to an IP address.

    Raises:
        OSError: it can't even begin to.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex((host, port))
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
    except OSError:
        sock.close()
        raise
    return sock
