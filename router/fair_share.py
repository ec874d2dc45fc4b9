"""Who is next among parties that wait, so that each gets work done in proportion to its weight.

Each party has a virtual time, the work that was done for it over its weight; who has the least is next. One
that starts to wait begins at the virtual time of the least served of those that wait, so that nobody saves up
credit while idle. When nobody waits, all is forgotten: fairness is among those that compete.

Source: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), with work charged when it starts.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final, Generic, Protocol, TypeVar


class Waiter(Protocol):
    """What waits. `work_s` is what it will take, in seconds of one node."""

    @property
    def work_s(self) -> float: ...


Waiting = TypeVar("Waiting", bound=Waiter)

Place = tuple[float, float, int, str]
"""Virtual time, weight with its sign changed, number and key of a party: sorted, the next party is first."""

_MAX_AHEAD: Final = 1024
"""Parties that don't wait now, but were served beyond the others, are remembered, at most so many."""


@dataclass(slots=True, eq=False)
class _Party:
    """`virtual_s` is its virtual time. Of those that are equal the one of more weight is next, then the one
    that came first, by `number`."""

    key: str
    weight: float
    virtual_s: float
    number: int

    @property
    def place(self) -> Place:
        return self.virtual_s, -self.weight, self.number, self.key


class FairShare(Generic[Waiting]):
    """See the module. `order` has those that wait, the next one first."""

    def __init__(self) -> None:
        self.order: list[Place] = []
        self._waiting: dict[str, _Party] = {}
        self._ahead: OrderedDict[str, _Party] = OrderedDict()
        self._num_parties_ever = 0

    def begin(self, key: str, weight: float = 1.0) -> None:
        """The party starts to wait."""
        assert key not in self._waiting
        floor_s = self.order[0][0] if self.order else 0.0
        party = self._ahead.pop(key, None)
        if party is None:
            self._num_parties_ever += 1
            party = _Party(key, weight, floor_s, self._num_parties_ever)
        party.virtual_s = max(party.virtual_s, floor_s)
        self._waiting[key] = party
        insort(self.order, party.place)

    def end(self, key: str) -> None:
        """Nothing of the party waits any more."""
        party = self._waiting.pop(key)
        del self.order[bisect_left(self.order, party.place)]
        if not self.order:
            self._ahead.clear()
        elif party.virtual_s > self.order[0][0]:
            self._ahead[key] = party
            if len(self._ahead) > _MAX_AHEAD:
                self._ahead.popitem(last=False)

    def charge(self, key: str, work_s: float) -> None:
        """Work is done for the party, or turned out to be so much more (below 0: less) than was charged; one
        that is not known is let go."""
        party = self._waiting.get(key)
        if party is None:
            party = self._ahead.get(key)
            if party is not None:
                party.virtual_s += work_s / party.weight
            return
        del self.order[bisect_left(self.order, party.place)]
        party.virtual_s += work_s / party.weight
        insort(self.order, party.place)

    def virtual_s(self, key: str) -> float:
        """The virtual time of a party, or what it would begin with."""
        party = self._waiting.get(key) or self._ahead.get(key)
        floor_s = self.order[0][0] if self.order else 0.0
        return max(party.virtual_s, floor_s) if party else floor_s

    def weight(self, key: str) -> float:
        """Of a party that waits."""
        return self._waiting[key].weight

    def walk(
        self, waiters_of: Callable[[str], Iterator[Waiting]], reach_s: float = float("inf")
    ) -> Iterator[Waiting]:
        """What waits, in the order in which it would be served if each took what it is expected to take.
        Only as far ahead as `reach_s` of virtual time beyond the least served party, unless that is alone.
        Nothing may change on the way."""
        order, limit_s = self.order, float("inf")
        if len(order) > 1:
            limit_s = order[0][0] + reach_s
        heap: list[tuple[float, float, int, Iterator[Waiting]]] = []
        num_met = 0
        while True:
            if num_met < len(order) and (not heap or order[num_met][0] <= heap[0][0]):
                virtual_s, weight, number, key = order[num_met]
                num_met += 1
                heappush(heap, (virtual_s, weight, number, waiters_of(key)))
                continue
            if not heap or heap[0][0] > limit_s:
                return
            virtual_s, weight, number, waiters = heappop(heap)
            waiter = next(waiters, None)
            if waiter is not None:
                yield waiter
                heappush(heap, (virtual_s - waiter.work_s / weight, weight, number, waiters))
