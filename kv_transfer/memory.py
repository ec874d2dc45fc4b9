"""Transport within one process, for tests and simulation: a copy between two services' staging."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import count
from secrets import token_bytes
from typing import ClassVar

from kvrelay.core.errors import ConfigError, TransferFailed
from kvrelay.core.kv import DeviceKind
from kvrelay.kv_transfer.transport import (
    PeerConnected,
    PeerLost,
    TransportContext,
    TransportEvent,
    WriteCompleted,
)


class MemoryTransport:
    """Every write is complete when `post_write` returns; the event comes from the next `poll`.

    Raises:
        ConfigError: the KV cache is not in host memory.
    """

    name = "memory"
    late_writes = False
    polls = False
    has_writes_in_flight = False

    _open: ClassVar[dict[bytes, MemoryTransport]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, context: TransportContext) -> None:
        if context.receive_staging.device_kind is not DeviceKind.CPU:
            raise ConfigError("KV transport memory is for host memory alone; use ucx for KV on CUDA devices")
        self._context = context
        self._key = token_bytes(16)
        self._admitted: set[int] = set()
        self._peers: dict[int, tuple[bytes, int]] = {}
        self._events: list[TransportEvent] = []
        self._write_ids = count(1)
        with self._lock:
            self._open[self._key] = self

    def endpoint(self) -> bytes:
        return self._key

    def admit(self, link_id: int) -> bytes:
        self._admitted.add(link_id)
        return link_id.to_bytes(8, "big")

    def connect(self, link_id: int, host: str, endpoint: bytes, ticket: bytes) -> None:
        self._peers[link_id] = (endpoint, int.from_bytes(ticket, "big"))
        self._events.append(PeerConnected(link_id))

    def post_write(self, link_id: int, local_offset: int, remote_offset: int, num_bytes: int) -> int:
        write_id = next(self._write_ids)
        source = self._context.send_staging.host_view()[local_offset : local_offset + num_bytes]
        key, remote_link_id = self._peers[link_id]
        with self._lock:
            peer = self._open.get(key)
            if peer is not None and peer._accept(remote_link_id, remote_offset, source):
                self._events.append(WriteCompleted(write_id))
            else:
                self._events.append(PeerLost(link_id, TransferFailed("the peer accepts no writes any more")))
        return write_id

    def _accept(self, link_id: int, offset: int, source: memoryview) -> bool:
        if link_id not in self._admitted or not self._context.may_write(link_id, offset, len(source)):
            return False
        self._context.receive_staging.host_view()[offset : offset + len(source)] = source
        return True

    def poll(self) -> Sequence[TransportEvent]:
        events, self._events = self._events, []
        return events

    def disconnect(self, link_id: int) -> None:
        with self._lock:
            self._admitted.discard(link_id)
        self._peers.pop(link_id, None)

    def close(self) -> None:
        with self._lock:
            self._open.pop(self._key, None)
