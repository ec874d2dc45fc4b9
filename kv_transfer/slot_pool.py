"""Staging slots of one side: who holds which, who waits, and which must rest before reuse."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Holder = TypeVar("Holder", bound=Hashable)


@dataclass(frozen=True, slots=True)
class SlotCounts:
    """`free` + `held` + `quarantined` is the size of the pool."""

    free: int
    held: int
    quarantined: int


class SlotPool(Generic[Holder]):
    """A bounded pool, handed out one slot at a time in turn between the holders that wait.

    A quarantined slot still belongs to its holder, and is out of use until the holder confirms that no
    write can reach it (`release`), or, where nobody can, a time has passed (`expire`).
    """

    def __init__(self, num_slots: int) -> None:
        self._free = list(reversed(range(num_slots)))
        self._holders: dict[int, Holder] = {}
        self._demand: OrderedDict[Holder, int] = OrderedDict()
        self._quarantined: dict[int, float | None] = {}

    @property
    def counts(self) -> SlotCounts:
        return SlotCounts(
            free=len(self._free),
            held=len(self._holders) - len(self._quarantined),
            quarantined=len(self._quarantined),
        )

    def holder_of(self, slot: int) -> Holder | None:
        """Who holds the slot, in quarantine too."""
        return self._holders.get(slot)

    def slots_of(self, holder: Holder) -> list[int]:
        """All slots of that holder, in quarantine too."""
        return [slot for slot, owner in self._holders.items() if owner == holder]

    def request(self, holder: Holder, num_slots: int) -> None:
        """Queue for `num_slots` more; a holder that waits already keeps its place."""
        self._demand[holder] = self._demand.get(holder, 0) + num_slots

    def withdraw(self, holder: Holder) -> None:
        """Stop waiting."""
        self._demand.pop(holder, None)

    def grant(self, limit: int | None = None) -> list[tuple[Holder, int]]:
        """Hand out what is free to those who wait, in turn, `limit` slots at most."""
        granted: list[tuple[Holder, int]] = []
        while self._free and self._demand and (limit is None or len(granted) < limit):
            holder, wanted = self._demand.popitem(last=False)
            if wanted > 1:
                self._demand[holder] = wanted - 1
            # The slot freed last is the likeliest to be in a cache, and untouched ones stay unbacked.
            slot = self._free.pop()
            self._holders[slot] = holder
            granted.append((holder, slot))
        return granted

    def free(self, slot: int) -> None:
        """Take a slot back that nobody will write to."""
        del self._holders[slot]
        self._quarantined.pop(slot, None)
        self._free.append(slot)

    def release(self, holder: Holder) -> None:
        """Free all that the holder has, in quarantine or not."""
        self.withdraw(holder)
        for slot in self.slots_of(holder):
            self.free(slot)

    def quarantine(self, holder: Holder, until_s: float | None) -> None:
        """Set all of the holder's slots aside: until `release`, or `until_s` where that is given."""
        self.withdraw(holder)
        for slot in self.slots_of(holder):
            self._quarantined[slot] = until_s

    def expire(self, now_s: float) -> None:
        """Free the slots whose quarantine is over."""
        over = [
            slot for slot, until_s in self._quarantined.items() if until_s is not None and until_s <= now_s
        ]
        for slot in over:
            self.free(slot)
