"""Limits and addresses of one node's KV transfer, validated when built."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Final

from kvrelay.core.errors import ConfigError
from kvrelay.core.kv import DeviceKind

TRANSPORT_CHOICES: Final = ("auto", "ucx", "tcp", "memory")
MAX_SLOTS: Final = 4096
_WILDCARD_HOSTS: Final = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class StagingSlots:
    """How the staging memory of one node is cut; see `KVTransferConfig`."""

    slot_bytes: int
    num_send_slots: int
    num_receive_slots: int
    slots_per_transfer: int


_DEFAULT_SLOTS: Final = {
    DeviceKind.CPU: StagingSlots(4 << 20, 4, 8, 4),
    # NVLink wants large messages, and several, so that one is gathered, one written and one scattered.
    DeviceKind.CUDA: StagingSlots(64 << 20, 8, 8, 8),
}


@dataclass(frozen=True, slots=True)
class KVTransferConfig:
    """How one node sends and receives KV.

    `transport` ``auto`` is ``ucx`` where NIXL works and ``tcp`` elsewhere. `listen_port` and `data_port`
    (the second one used by ``tcp`` only) may be 0: any free port. `listen_host` empty: a node takes the
    address from which it reaches its routers, anything else 127.0.0.1. `advertised_host` is what peers dial,
    by default `listen_host`.

    Bytes in flight are bounded by `slot_bytes` times `num_send_slots` on the sending side and times
    `num_receive_slots` on the receiving side; one transfer holds at most `slots_per_transfer` of each. What
    is None depends on where the KV is: 4 MiB, 4, 8 and 4 in host memory, 64 MiB, 8, 8 and 8 on a GPU.
    `max_concurrent_transfers` counts each direction by itself. An offer that nobody expects is kept for
    `pending_offer_timeout_s`. A transfer or peer without progress for `progress_timeout_s` is given up;
    slots that a late write could still reach are set aside for `quarantine_s`; a link that carries
    nothing for `link_idle_s` is closed.

    A new link over UCX is measured: one that gives less than `link_floor_gb_per_s` (negative: 50 between
    GPUs of one host, else 0) is warned about, and with `refuse_slow_links` refused.

    `verify_checksums` asks for xxh3 over every message that is in host memory, and refuses what comes without
    it: so it must be the same on all nodes. `ucx_tls` overrides the
    list of UCX transports; empty: the environment's ``UCX_TLS``, or one that suits the machine.

    Raises:
        ConfigError: listing every fault.
    """

    transport: str = "auto"
    listen_host: str = ""
    listen_port: int = 0
    data_port: int = 0
    advertised_host: str = ""
    slot_bytes: int | None = None
    num_send_slots: int | None = None
    num_receive_slots: int | None = None
    slots_per_transfer: int | None = None
    max_concurrent_transfers: int = 256
    max_pending_offers: int = 256
    max_links: int = 256
    connect_timeout_s: float = 5.0
    pending_offer_timeout_s: float = 5.0
    progress_timeout_s: float = 10.0
    quarantine_s: float = 5.0
    link_idle_s: float = 300.0
    verify_checksums: bool = True
    ucx_tls: str = ""
    link_floor_gb_per_s: float = -1.0
    refuse_slow_links: bool = False

    def __post_init__(self) -> None:
        faults = [*self._address_faults(), *self._count_faults(), *self._time_faults()]
        if faults:
            raise ConfigError("\n".join(faults))

    def _address_faults(self) -> list[str]:
        faults = []
        if self.transport not in TRANSPORT_CHOICES:
            faults.append(f"transport must be one of {', '.join(TRANSPORT_CHOICES)}, got {self.transport!r}")
        if self.listen_host in _WILDCARD_HOSTS and not self.advertised_host:
            faults.append(f"advertised_host must be given when listen_host is {self.listen_host}")
        return faults + [
            f"{name} must be from 0 to 65535, got {getattr(self, name)}"
            for name in ("listen_port", "data_port")
            if not 0 <= getattr(self, name) <= 65535
        ]

    def _count_faults(self) -> list[str]:
        bounds = {
            "slot_bytes": (1, 1 << 34),
            "num_send_slots": (1, MAX_SLOTS),
            "num_receive_slots": (1, MAX_SLOTS),
            "slots_per_transfer": (1, MAX_SLOTS),
            "max_concurrent_transfers": (1, 1 << 20),
            "max_pending_offers": (1, 1 << 20),
            "max_links": (1, 1 << 16),
        }
        return [
            f"{name} must be from {low} to {high}, got {getattr(self, name)}"
            for name, (low, high) in bounds.items()
            if (value := getattr(self, name)) is not None and not low <= value <= high
        ]

    def _time_faults(self) -> list[str]:
        positive = (
            "connect_timeout_s",
            "pending_offer_timeout_s",
            "progress_timeout_s",
            "quarantine_s",
            "link_idle_s",
        )
        faults = [
            f"{name} must be above 0 and at most 86400 seconds, got {getattr(self, name)}"
            for name in positive
            if not 0 < getattr(self, name) <= 86400
        ]
        if not self.link_floor_gb_per_s <= 10_000:
            faults.append(f"link_floor_gb_per_s must be at most 10000, got {self.link_floor_gb_per_s}")
        if self.pending_offer_timeout_s >= self.progress_timeout_s:
            faults.append("pending_offer_timeout_s must be shorter than progress_timeout_s")
        return faults

    def slots(self, device_kind: DeviceKind) -> StagingSlots:
        """The staging slots of a node whose KV is there."""
        given = {spec.name: getattr(self, spec.name) for spec in fields(StagingSlots)}
        chosen = {name: value for name, value in given.items() if value is not None}
        return replace(_DEFAULT_SLOTS[device_kind], **chosen)

    @property
    def bound_host(self) -> str:
        """The host whose ports are listened on."""
        return self.listen_host or "127.0.0.1"

    @property
    def dialled_host(self) -> str:
        """The host that peers connect to."""
        return self.advertised_host or self.bound_host
