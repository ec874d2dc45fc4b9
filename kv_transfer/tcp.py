"""Transport over plain sockets: the fall-back where NIXL does not run.

The receiver listens on a data port of its own; the sender opens one data connection per link and shows
the ticket that it got over the control connection. Then messages: a header of three 64-bit integers
(write id, offset in the receiver's staging, length), then the bytes, received straight into the staging
memory. The receiver answers each with its write id, so a completed write is one that has arrived.
"""

from __future__ import annotations

import socket
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from secrets import token_bytes
from typing import Final

from kvrelay.core.errors import ConfigError, TransferFailed
from kvrelay.core.kv import DeviceKind
from kvrelay.kv_transfer.tcp_streams import (
    PREFACE_BYTES,
    TICKET_BYTES,
    IncomingStream,
    OutgoingStream,
)
from kvrelay.kv_transfer.transport import (
    PeerConnected,
    PeerLost,
    TransportContext,
    TransportEvent,
    WriteCompleted,
)

_READ: Final = 1
_WRITE: Final = 2
_MAX_ANONYMOUS: Final = 64


class TCPTransport:
    """See the module's text.

    Raises:
        ConfigError: the KV cache is not in host memory, or the data port can't be bound.
    """

    name = "tcp"
    late_writes = False
    polls = False

    def __init__(self, context: TransportContext) -> None:
        if context.receive_staging.device_kind is not DeviceKind.CPU:
            raise ConfigError(
                "KV transport tcp moves host memory only; use ucx for KV caches on CUDA devices"
            )
        self._context = context
        self._listener = _listen(context.listen_host, context.data_port)
        self._context.watcher.watch(self._listener, _READ, self._on_connection)
        self._tickets: dict[bytes, int] = {}
        self._anonymous: OrderedDict[IncomingStream, None] = OrderedDict()
        self._incoming: dict[int, IncomingStream] = {}
        self._outgoing: dict[int, OutgoingStream] = {}
        self._events: list[TransportEvent] = []
        self._write_ids = count(1)

    @property
    def has_writes_in_flight(self) -> bool:
        return any(stream.num_unanswered for stream in self._outgoing.values())

    def endpoint(self) -> bytes:
        return int(self._listener.getsockname()[1]).to_bytes(2, "big")

    def admit(self, link_id: int) -> bytes:
        ticket = token_bytes(TICKET_BYTES)
        self._tickets[ticket] = link_id
        return ticket

    def connect(self, link_id: int, host: str, endpoint: bytes, ticket: bytes) -> None:
        try:
            if len(endpoint) != 2 or len(ticket) != TICKET_BYTES:
                raise TransferFailed("the peer's tcp endpoint is malformed")
            stream = OutgoingStream(host, int.from_bytes(endpoint, "big"), ticket)
        except (OSError, TransferFailed) as error:
            self._events.append(PeerLost(link_id, TransferFailed(f"no data connection: {error}")))
            return
        self._outgoing[link_id] = stream
        self._context.watcher.watch(
            stream.sock, _READ | _WRITE, lambda events: self._on_outgoing(link_id, stream, events)
        )

    def post_write(self, link_id: int, local_offset: int, remote_offset: int, num_bytes: int) -> int:
        write_id = next(self._write_ids)
        source = self._context.send_staging.host_view()[local_offset : local_offset + num_bytes]
        stream = self._outgoing.get(link_id)
        if stream is None:
            return write_id  # `PeerLost` is on its way
        stream.enqueue(write_id, remote_offset, source)
        self._on_outgoing(link_id, stream, _WRITE)
        return write_id

    def poll(self) -> Sequence[TransportEvent]:
        events, self._events = self._events, []
        return events

    def disconnect(self, link_id: int) -> None:
        self._tickets = {key: value for key, value in self._tickets.items() if value != link_id}
        for stream in (self._outgoing.pop(link_id, None), self._incoming.pop(link_id, None)):
            if stream is not None:
                self._drop(stream)

    def close(self) -> None:
        for link_id in [*self._outgoing, *self._incoming]:
            self.disconnect(link_id)
        for stream in self._anonymous:
            self._drop(stream)
        self._anonymous.clear()
        self._context.watcher.unwatch(self._listener)
        self._listener.close()

    def _drop(self, stream: IncomingStream | OutgoingStream) -> None:
        self._context.watcher.unwatch(stream.sock)
        stream.sock.close()

    def _on_outgoing(self, link_id: int, stream: OutgoingStream, events: int) -> None:
        if self._outgoing.get(link_id) is not stream:
            return
        was_open = stream.is_open
        try:
            if events & _WRITE:
                stream.send()
            answered = stream.receive_answers() if events & _READ else []
        except (OSError, TransferFailed) as error:
            self.disconnect(link_id)
            self._events.append(PeerLost(link_id, TransferFailed(f"data connection lost: {error}")))
            return
        if stream.is_open and not was_open:
            self._events.append(PeerConnected(link_id))
        self._events.extend(WriteCompleted(write_id) for write_id in answered)
        mask = _READ | (_WRITE if stream.has_unsent else 0)
        self._context.watcher.watch(
            stream.sock, mask, lambda ready: self._on_outgoing(link_id, stream, ready)
        )

    def _on_connection(self, _events: int) -> None:
        try:
            sock, _address = self._listener.accept()
        except OSError:
            return
        if len(self._anonymous) >= _MAX_ANONYMOUS:
            oldest, _ = self._anonymous.popitem(last=False)
            self._drop(oldest)
        stream = IncomingStream(sock)
        self._anonymous[stream] = None
        self._context.watcher.watch(sock, _READ, lambda _events: self._on_preface(stream))

    def _on_preface(self, stream: IncomingStream) -> None:
        if stream not in self._anonymous:
            return
        try:
            preface = stream.receive_preface()
        except (OSError, TransferFailed):
            preface = bytes(PREFACE_BYTES)
        if preface is None:
            return
        self._anonymous.pop(stream, None)
        link_id = self._tickets.pop(stream.ticket_of(preface), None)
        if link_id is None:
            self._drop(stream)
            return
        self._incoming[link_id] = stream
        staging = self._context.receive_staging.host_view()
        stream.begin(staging, lambda offset, num_bytes: self._context.may_write(link_id, offset, num_bytes))
        self._watch_incoming(link_id, stream)

    def _watch_incoming(self, link_id: int, stream: IncomingStream) -> None:
        mask = _READ | (_WRITE if stream.has_unsent else 0)
        self._context.watcher.watch(stream.sock, mask, lambda _events: self._on_incoming(link_id, stream))

    def _on_incoming(self, link_id: int, stream: IncomingStream) -> None:
        if self._incoming.get(link_id) is not stream:
            return
        try:
            stream.receive()
            stream.send_answers()
        except (OSError, TransferFailed) as error:
            self.disconnect(link_id)
            self._events.append(PeerLost(link_id, TransferFailed(f"data connection lost: {error}")))
            return
        self._watch_incoming(link_id, stream)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(f"can't listen on {host}:{port} for KV data: {error}") from error
    listener.setblocking(False)
    return listener
