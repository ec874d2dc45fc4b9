"""The seam to what moves the bulk bytes: one-sided writes from a sender's staging into a receiver's.

Everything here is called from the one thread that owns the transport, and nothing blocks for long.
A write is complete when its bytes are visible in the receiver's staging memory.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from kvrelay.core.errors import KVRelayError
from kvrelay.core.kv import StagingMemory

SCRATCH_BYTES: Final = 16 << 20
"""At the end of each staging memory, for writes that only try or time a connection; part of the protocol."""


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """Writes to that peer may be posted. `bytes_per_s` is what the link gave, where it was measured."""

    link_id: int
    bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class LinkTried:
    """A write that only tries or times the connection is done: more may follow at once, so that whoever
    polls should go on without a pause."""

    link_id: int


@dataclass(frozen=True, slots=True)
class WriteCompleted:
    """The bytes are visible to the peer."""

    write_id: int


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The peer can't be reached; its writes end without a further event."""

    link_id: int
    error: KVRelayError


TransportEvent = PeerConnected | LinkTried | WriteCompleted | PeerLost


class Watcher(Protocol):
    """Readiness of sockets. `events` and what `callback` gets are masks of `selectors.EVENT_*`."""

    def watch(self, sock: socket.socket, events: int, callback: Callable[[int], None]) -> None:
        """Watch, or change what is watched."""
        ...

    def unwatch(self, sock: socket.socket) -> None:
        """Stop watching; unknown sockets are ignored."""
        ...


@dataclass(frozen=True, slots=True)
class TransportContext:
    """What a transport is built with.

    `name` is unique for ever. Both stagings end in `SCRATCH_BYTES` that no slot covers.
    `may_write(link_id, offset_bytes, num_bytes)` says whether that peer was granted that part of
    `receive_staging`; a transport that sees bytes before they are placed must ask.
    """

    name: str
    listen_host: str
    data_port: int
    ucx_tls: str
    send_staging: StagingMemory
    receive_staging: StagingMemory
    watcher: Watcher
    may_write: Callable[[int, int, int], bool]


class KVTransport(Protocol):
    """`link_id` names one connection to one peer, in either direction, and is never reused."""

    @property
    def name(self) -> str:
        """``ucx``, ``tcp`` or ``memory``: both sides of a link must use the same."""
        ...

    @property
    def late_writes(self) -> bool:
        """Whether a write may still land in this node's staging after its link was disconnected."""
        ...

    @property
    def polls(self) -> bool:
        """Whether progress needs `poll` calls, rather than coming from the `Watcher`."""
        ...

    @property
    def has_writes_in_flight(self) -> bool: ...

    def endpoint(self) -> bytes:
        """What a sender needs to write into this node's `receive_staging`."""
        ...

    def admit(self, link_id: int) -> bytes:
        """Accept writes over this incoming link; returns the ticket that the sender must show."""
        ...

    def connect(self, link_id: int, host: str, endpoint: bytes, ticket: bytes) -> None:
        """Begin; the outcome comes from `poll` as `PeerConnected` or `PeerLost`."""
        ...

    def post_write(self, link_id: int, local_offset: int, remote_offset: int, num_bytes: int) -> int:
        """Begin copying part of `send_staging` into the peer's `receive_staging`; offsets in bytes.

        Returns the id that `WriteCompleted` will carry; a failure comes as `PeerLost`.
        """
        ...

    def poll(self) -> Sequence[TransportEvent]:
        """Drive progress and return what happened since the last call."""
        ...

    def disconnect(self, link_id: int) -> None:
        """Drop the link and its writes, which end without an event. Unknown links are ignored."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


TransportFactory = Callable[[TransportContext], KVTransport]
