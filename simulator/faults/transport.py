"""One-sided writes of a virtual network: late, torn, or landing when nobody wants them any more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from kvrelay.core.errors import TransferFailed
from kvrelay.core.ids import TransferId
from kvrelay.kv_transfer.transport import (
    PeerConnected,
    PeerLost,
    TransportContext,
    TransportEvent,
    WriteCompleted,
)
from kvrelay.simulator.faults.network import Network
from kvrelay.simulator.faults.process import Process
from kvrelay.simulator.faults.world import Violation


@dataclass(slots=True)
class WireFaults:
    """What the KV wire does wrong. `late_writes`: a write may still land `late_s` after its link has gone.
    A write takes `write_s` at most, beyond the network's delay."""

    write_s: float = 0.0
    late_writes: bool = False
    late_s: float = 0.0
    corrupt_rate: float = 0.0
    num_corrupted: int = 0
    num_late: int = 0


@dataclass(slots=True)
class _Write:
    write_id: int
    link_id: int
    local_offset: int
    remote_offset: int
    num_bytes: int
    holder: TransferId | None


class SimTransport:
    """See `KVTransport`. The bytes are read and written when the write lands, and not before.

    `holder_of` says which transfer a part of this node's receive staging is granted to: when a write lands,
    it must still be the one that it was posted for.
    """

    polls = False
    has_writes_in_flight = False
    name = "memory"

    def __init__(
        self,
        context: TransportContext,
        process: Process,
        network: Network,
        fabric: Fabric,
        wake: Callable[[], None],
    ) -> None:
        self._context = context
        self._process = process
        self._life = process.life
        self._network = network
        self._fabric = fabric
        self._wake = wake
        self._events: list[TransportEvent] = []
        self._write_ids = count(1)
        self._admitted: set[int] = set()
        self._parted_s: dict[int, float] = {}
        self._peers: dict[int, tuple[SimTransport, int]] = {}
        self._key = fabric.add(self)
        self.holder_of: Callable[[int], TransferId | None] = _nobody

    @property
    def late_writes(self) -> bool:
        """See `KVTransport`."""
        return self._fabric.faults.late_writes

    @property
    def is_living(self) -> bool:
        """Whether its process is still the same."""
        return self._process.is_alive and self._process.life == self._life

    def endpoint(self) -> bytes:
        """See `KVTransport`."""
        return self._key.to_bytes(8, "big")

    def admit(self, link_id: int) -> bytes:
        """See `KVTransport`."""
        self._admitted.add(link_id)
        return link_id.to_bytes(8, "big")

    def connect(self, link_id: int, host: str, endpoint: bytes, ticket: bytes) -> None:
        """See `KVTransport`."""
        peer = self._fabric.find(int.from_bytes(endpoint, "big"))
        if peer is None:
            self._tell(PeerLost(link_id, TransferFailed("there is no such endpoint")))
            return
        self._peers[link_id] = (peer, int.from_bytes(ticket, "big"))
        delay_s = self._network.delay_s(self._process, peer._process)
        self._process.after(delay_s, lambda: self._tell(PeerConnected(link_id)))

    def post_write(self, link_id: int, local_offset: int, remote_offset: int, num_bytes: int) -> int:
        """See `KVTransport`."""
        found = self._peers.get(link_id)
        holder = found[0].holder_of(remote_offset) if found is not None and found[0].is_living else None
        write = _Write(next(self._write_ids), link_id, local_offset, remote_offset, num_bytes, holder)
        if found is None:
            self._tell(PeerLost(link_id, TransferFailed("the link is gone")))
        else:
            self._try_to_land(write, *found)
        return write.write_id

    def poll(self) -> Sequence[TransportEvent]:
        """See `KVTransport`."""
        events, self._events = self._events, []
        return events

    def disconnect(self, link_id: int) -> None:
        """See `KVTransport`."""
        now_s = self._process.world.now_s
        if link_id in self._admitted:
            self._admitted.discard(link_id)
            self._parted_s[link_id] = now_s
        if self._peers.pop(link_id, None) is not None:
            self._parted_s[link_id] = now_s

    def close(self) -> None:
        """See `KVTransport`."""
        self._fabric.remove(self._key)

    def _tell(self, event: TransportEvent) -> None:
        self._events.append(event)
        self._wake()

    def _try_to_land(self, write: _Write, peer: SimTransport, ticket: int) -> None:
        """It goes on by itself, whatever becomes of this process' threads; but not of its memory."""
        world = self._process.world
        delay_s = self._network.delay_s(self._process, peer._process)
        delay_s += world.rng.random() * self._fabric.faults.write_s

        def arrive() -> None:
            if not self.is_living:
                return
            if self._network.is_cut(self._process, peer._process):
                world.after(0.1, arrive)
            elif not peer.is_living:
                self._process.deliver(lambda: self._on_lost(write.link_id))
            else:
                self._land(write, peer, ticket)

        world.after(delay_s, arrive)

    def _land(self, write: _Write, peer: SimTransport, ticket: int) -> None:
        is_parted = write.link_id not in self._peers or ticket not in peer._admitted
        if is_parted and not self._may_land_late(write, peer, ticket):
            if write.link_id in self._peers:
                self._process.deliver(lambda: self._on_lost(write.link_id))
            return
        self._fabric.faults.num_late += is_parted
        if peer.holder_of(write.remote_offset) != write.holder:
            raise Violation(
                f"a write of transfer {write.holder} landed in a slot of {peer._process.name} that is"
                f" {peer.holder_of(write.remote_offset)}'s now"
            )
        source = self._context.send_staging.host_view()[write.local_offset :][: write.num_bytes]
        target = peer._context.receive_staging.host_view()[write.remote_offset :][: write.num_bytes]
        target[:] = source
        if self._process.world.chance(self._fabric.faults.corrupt_rate):
            self._fabric.faults.num_corrupted += 1
            target[self._process.world.rng.randrange(write.num_bytes)] ^= 0x10
        if not is_parted:
            self._process.deliver(lambda: self._tell(WriteCompleted(write.write_id)))

    def _may_land_late(self, write: _Write, peer: SimTransport, ticket: int) -> bool:
        """Within the time that a late write may take after each side has let go of the link."""
        if not self.late_writes:
            return False
        now_s = self._process.world.now_s
        parted = [
            transport._parted_s[link_id]
            for transport, link_id in ((self, write.link_id), (peer, ticket))
            if link_id in transport._parted_s
        ]
        return all(now_s - parted_s <= self._fabric.faults.late_s for parted_s in parted)

    def _on_lost(self, link_id: int) -> None:
        if link_id in self._peers:
            self._tell(PeerLost(link_id, TransferFailed("the peer accepts no writes any more")))


def _nobody(_offset: int) -> None:
    return None


class Fabric:
    """All transports, by the keys in their endpoints."""

    def __init__(self) -> None:
        self.faults = WireFaults()
        self._transports: dict[int, SimTransport] = {}
        self._num_ever = 0

    def add(self, transport: SimTransport) -> int:
        """Its key, which is never used again."""
        self._num_ever += 1
        self._transports[self._num_ever] = transport
        return self._num_ever

    def find(self, key: int) -> SimTransport | None:
        """The transport of that key, while it is open."""
        return self._transports.get(key)

    def remove(self, key: int) -> None:
        """It is closed."""
        self._transports.pop(key, None)
