"""Gathers or scatters that the store has begun, each with what is to be done when it is done."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvrelay.core.ids import TransferId
from kvrelay.core.kv import CopyUnderWay, FinishedCopy

Item = TypeVar("Item")


@dataclass(slots=True)
class _Entry(Generic[Item]):
    transfer_id: TransferId
    copy: CopyUnderWay
    item: Item


class Copies(Generic[Item]):
    """First in, first out, as copies of one store are done. As many as there are slots at most."""

    def __init__(self) -> None:
        self._entries: deque[_Entry[Item]] = deque()

    def __bool__(self) -> bool:
        return bool(self._entries)

    def add(self, transfer_id: TransferId, copy: CopyUnderWay, item: Item) -> None:
        self._entries.append(_Entry(transfer_id, copy, item))

    def pop_done(self) -> Item | None:
        """Remove the oldest and return its item, if it is done."""
        if not self._entries or not self._entries[0].copy.is_done():
            return None
        return self._entries.popleft().item

    def take(self, transfer_id: TransferId) -> list[Item]:
        """Remove the transfer's; on return none of them uses its blocks or slots any more."""
        taken = [entry for entry in self._entries if entry.transfer_id == transfer_id]
        for entry in taken:
            entry.copy.wait()
            self._entries.remove(entry)
        return [entry.item for entry in taken]

    def settle(self) -> None:
        """Wait for all. Those of a device that fails meanwhile use nothing any more, and count as done."""
        for entry in self._entries:
            with suppress(RuntimeError):
                entry.copy.wait()
            entry.copy = FinishedCopy(entry.copy.num_bytes)
