"""Leases: how long a node holds KV for a router that it does not hear."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Lease:
    lease_s: float
    heard_s: float


class Leases:
    """One lease per router epoch, renewed by anything heard from that router."""

    def __init__(self) -> None:
        self._leases: dict[int, _Lease] = {}

    def __contains__(self, router_epoch: int) -> bool:
        return router_epoch in self._leases

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, router_epoch: int, lease_s: float, now_s: float) -> None:
        """Start or restart that router's lease."""
        self._leases[router_epoch] = _Lease(lease_s, now_s)

    def renew(self, router_epoch: int, now_s: float) -> bool:
        """That router was heard. False if its lease has run out, or never was granted."""
        lease = self._leases.get(router_epoch)
        if lease is None:
            return False
        lease.heard_s = now_s
        return True

    def take_expired(self, now_s: float) -> list[int]:
        """Forget and return the routers not heard for longer than their lease."""
        expired = [epoch for epoch, lease in self._leases.items() if now_s - lease.heard_s > lease.lease_s]
        for epoch in expired:
            del self._leases[epoch]
        return expired
