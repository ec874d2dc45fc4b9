"""What waits for nodes of one model, in the order in which it is to start.

First come continuations, which were let in once. Then classes share by weight (`priorities`), and within a
class its tenants share alike (`fair_share`); work is counted in seconds of nodes, as predicted. Nobody
starves: a class or tenant that waits gets its share, however many requests others have. Within a tenant, what
must start soonest goes first.

A policy may choose among what waits. Of several tenants it sees only what each is to get next, a few
requests, so it can't serve one much before the others. The classes it sees as groups, the one whose turn it
is first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final, Generic, Protocol, TypeVar

from kvrelay.core.service_terms import Priority, ServiceTerms
from kvrelay.router.fair_share import FairShare
from kvrelay.router.priorities import Priorities

_REACH: Final = 4.0
"""A tenant shows about so many requests of average work while others of its class wait."""
_MEMORY: Final = 0.02
"""Weight of the newest request in the average."""


class QueuedWaiter(Protocol):
    """What waits. The properties do not change while it does."""

    @property
    def serial(self) -> int:
        """Of the order of arrival, and its name here."""
        ...

    @property
    def terms(self) -> ServiceTerms: ...

    @property
    def due_s(self) -> float:
        """When it should start at the latest."""
        ...

    @property
    def work_s(self) -> float:
        """Seconds of nodes that it is expected to take."""
        ...

    @property
    def num_room_tokens(self) -> int:
        """KV room that it will need."""
        ...


Queued = TypeVar("Queued", bound=QueuedWaiter)


class _Line(Generic[Queued]):
    """What waits of one tenant in one class, by when it is due."""

    __slots__ = ("queued", "work_s")

    def __init__(self) -> None:
        self.queued: list[tuple[float, int, Queued]] = []
        self.work_s = 0.0

    def add(self, waiter: Queued) -> None:
        insort(self.queued, (waiter.due_s, waiter.serial, waiter), key=_due_and_serial)
        self.work_s += waiter.work_s

    def remove(self, waiter: Queued) -> None:
        place = self.place(waiter)
        assert self.queued[place][2] is waiter
        del self.queued[place]
        self.work_s = self.work_s - waiter.work_s if self.queued else 0.0

    def place(self, waiter: Queued) -> int:
        """How many are before it, be it here or not."""
        return bisect_left(self.queued, (waiter.due_s, waiter.serial), key=_due_and_serial)

    def work_before_s(self, waiter: Queued) -> float:
        place = self.place(waiter)
        if 2 * place > len(self.queued):
            return max(0.0, self.work_s - sum(later[2].work_s for later in self.queued[place:]))
        return sum(earlier[2].work_s for earlier in self.queued[:place])


def _due_and_serial(queued: tuple[float, int, object]) -> tuple[float, int]:
    return queued[0], queued[1]


class _Class(Generic[Queued]):
    """What waits in one class."""

    __slots__ = ("lines", "num_queued", "share", "work_s")

    def __init__(self) -> None:
        self.lines: dict[str, _Line[Queued]] = {}
        self.share: FairShare[Queued] = FairShare()
        self.num_queued = 0
        self.work_s = 0.0

    def waiters_of(self, tenant: str) -> Iterator[Queued]:
        return (queued[2] for queued in self.lines[tenant].queued)


class FairQueue(Generic[Queued]):
    """See the module. Every change takes the logarithm of what waits, and a move within a list."""

    def __init__(self, priorities: Priorities) -> None:
        self.front: OrderedDict[int, Queued] = OrderedDict()
        self._priorities = priorities
        self._classes: dict[str, _Class[Queued]] = {priority.value: _Class() for priority in Priority}
        self._share: FairShare[Queued] = FairShare()
        self.total_work_s = 0.0
        self.total_tokens = 0
        self._front_work_s = 0.0
        self._mean_work_s = 0.0

    def __len__(self) -> int:
        return len(self.front) + sum(found.num_queued for found in self._classes.values())

    def __contains__(self, waiter: Queued) -> bool:
        if waiter.serial in self.front:
            return True
        line = self._classes[waiter.terms.priority].lines.get(waiter.terms.tenant)
        place = line.place(waiter) if line else 0
        return line is not None and place < len(line.queued) and line.queued[place][2] is waiter

    def __iter__(self) -> Iterator[Queued]:
        """As a policy is to see it: classes in the order of their turns, each as a whole."""
        yield from self.front.values()
        reach_s = _REACH * self._mean_work_s
        for *_, priority in tuple(self._share.order):
            found = self._classes[priority]
            yield from found.share.walk(found.waiters_of, reach_s)

    def all(self) -> Iterator[Queued]:
        """Everything that waits, in no particular order."""
        yield from self.front.values()
        for found in self._classes.values():
            for line in found.lines.values():
                yield from (queued[2] for queued in line.queued)

    def num_of_class(self, priority: Priority) -> int:
        """How many of the class wait, less the continuations."""
        return self._classes[priority].num_queued

    def num_of_tenant(self, terms: ServiceTerms) -> int:
        """How many of that tenant wait in that class, less the continuations."""
        line = self._classes[terms.priority].lines.get(terms.tenant)
        return len(line.queued) if line else 0

    # ---- changes --------------------------------------------------------------------------------

    def add(self, waiter: Queued) -> None:
        """A new request waits."""
        priority, tenant = waiter.terms.priority, waiter.terms.tenant
        found = self._classes[priority]
        if not found.num_queued:
            self._share.begin(priority, self._priorities.weight_of(priority))
        line = found.lines.get(tenant)
        if line is None:
            line = found.lines[tenant] = _Line()
            found.share.begin(tenant)
        line.add(waiter)
        found.num_queued += 1
        found.work_s += waiter.work_s
        self._count(waiter, 1)
        self._mean_work_s += (_MEMORY if self._mean_work_s else 1.0) * (waiter.work_s - self._mean_work_s)

    def add_first(self, waiter: Queued) -> None:
        """A continuation waits, before all others."""
        self.front[waiter.serial] = waiter
        self.front.move_to_end(waiter.serial, last=False)
        self._front_work_s += waiter.work_s
        self._count(waiter, 1)

    def remove(self, waiter: Queued) -> None:
        """It does not wait any more."""
        self._count(waiter, -1)
        if self.front.pop(waiter.serial, None) is not None:
            self._front_work_s = self._front_work_s - waiter.work_s if self.front else 0.0
            return
        priority, tenant = waiter.terms.priority, waiter.terms.tenant
        found = self._classes[priority]
        line = found.lines[tenant]
        line.remove(waiter)
        found.num_queued -= 1
        found.work_s = found.work_s - waiter.work_s if found.num_queued else 0.0
        if not line.queued:
            del found.lines[tenant]
            found.share.end(tenant)
        if not found.num_queued:
            self._share.end(priority)

    def charge(self, terms: ServiceTerms, work_s: float) -> None:
        """So many seconds of nodes go to that tenant and class; called before `remove` for what starts."""
        self._classes[terms.priority].share.charge(terms.tenant, work_s)
        self._share.charge(terms.priority, work_s)

    def _count(self, waiter: Queued, sign: int) -> None:
        self.total_work_s += sign * waiter.work_s
        self.total_tokens += sign * waiter.num_room_tokens

    # ---- what is ahead --------------------------------------------------------------------------

    def work_ahead_s(self, waiter: Queued) -> float:
        """Seconds of nodes that what is waiting now takes before it is this one's turn, be it in the queue
        or not. What comes later may pass it."""
        terms = waiter.terms
        found = self._classes[terms.priority]
        own = self._ahead_in_class_s(found, waiter)
        weight = self._priorities.weight_of(terms.priority)
        until_s = self._share.virtual_s(terms.priority) + own / weight
        total = self._front_work_s + own
        for virtual_s, _, _, priority in self._share.order:
            if priority != terms.priority:
                lead = max(0.0, until_s - virtual_s) * self._share.weight(priority)
                total += min(self._classes[priority].work_s, lead)
        return total

    def _ahead_in_class_s(self, found: _Class[Queued], waiter: Queued) -> float:
        tenant = waiter.terms.tenant
        line = found.lines.get(tenant)
        own = line.work_before_s(waiter) if line else 0.0
        until_s = found.share.virtual_s(tenant) + own
        others = (
            min(found.lines[other].work_s, max(0.0, until_s - virtual_s))
            for virtual_s, _, _, other in found.share.order
            if other != tenant
        )
        return own + sum(others)
