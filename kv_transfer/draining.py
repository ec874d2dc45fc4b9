"""Transfers that ended here while their sender may still write to slots they held."""

from __future__ import annotations

from dataclasses import dataclass

from kvrelay.core.ids import TransferId


@dataclass(frozen=True, slots=True)
class _Entry:
    link_id: int
    since_s: float


class Draining:
    """Until the sender confirms, or its link is lost."""

    def __init__(self) -> None:
        self._entries: dict[TransferId, _Entry] = {}

    def add(self, transfer_id: TransferId, link_id: int, now_s: float) -> None:
        self._entries[transfer_id] = _Entry(link_id, now_s)

    def take(self, transfer_id: TransferId, link_id: int) -> bool:
        """Remove it if it drains over that link; returns whether it did."""
        if self.link_of(transfer_id) != link_id:
            return False
        del self._entries[transfer_id]
        return True

    def link_of(self, transfer_id: TransferId) -> int | None:
        entry = self._entries.get(transfer_id)
        return entry.link_id if entry else None

    def has_link(self, link_id: int) -> bool:
        return any(entry.link_id == link_id for entry in self._entries.values())

    def oldest_s(self, link_id: int, now_s: float) -> float:
        """Since when that link's oldest entry drains; `now_s` when it has none."""
        return min(
            (entry.since_s for entry in self._entries.values() if entry.link_id == link_id), default=now_s
        )

    def drop_link(self, link_id: int) -> list[TransferId]:
        """Remove and return all of that link's."""
        found = [key for key, entry in self._entries.items() if entry.link_id == link_id]
        for transfer_id in found:
            del self._entries[transfer_id]
        return found
