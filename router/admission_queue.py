"""What waits for a pair of nodes, and what is refused because it would wait in vain.

Bounded by class and by tenant; the order is `fair_queue`'s, the times are those of `prospects`. A request
that can't start at once is refused if its class is full, if its tenant has its share of the room, or if it
would be too late even at best. One in a while of the latter is served all the same, a *trial*, to find out
how many such refusals are false.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from random import Random

from kvrelay.core.errors import DeadlineExceeded, KVRelayError, Overloaded
from kvrelay.core.explanation import Decision
from kvrelay.core.node_messages import PrefillFinished
from kvrelay.core.service_terms import Priority, ServiceTerms
from kvrelay.router.cluster_state import ClusterState
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.fair_queue import FairQueue
from kvrelay.router.ledger import RequestEntry, RequestState
from kvrelay.router.prospects import Prospects


class Refusal(StrEnum):
    """Why a request that was sound was not served."""

    FULL = "full"
    """Its class has no room in the queue."""
    TENANT = "tenant"
    """Its tenant has its share of the queue already."""
    DEADLINE = "deadline"
    """It would be too late even at best: told at once."""
    DROPPED = "dropped"
    """The same, found out while it waited or when it was to be placed."""
    TIMEOUT = "timeout"
    """It waited for `queue_timeout_s`."""


@dataclass(slots=True)
class QueueCounts:
    """What became of requests, since the router started. `num_trials` were served though they would have been
    refused by their deadline; of these, `num_trials_in_time` made it."""

    refused: Counter[tuple[Priority, Refusal]] = field(default_factory=Counter)
    num_trials: int = 0
    num_trials_in_time: int = 0


@dataclass(slots=True, eq=False)
class AdmissionQueue:
    """See the module. Continuations, which were let in once, wait before all others, bounded by what the
    nodes could run."""

    config: RouterCoreConfig
    cluster: ClusterState
    rng: Random
    prospects: Prospects = field(init=False)
    waiting: dict[str, FairQueue[RequestEntry]] = field(default_factory=dict)
    counts: QueueCounts = field(default_factory=QueueCounts)
    num_queued: int = 0
    _num_of_class: Counter[Priority] = field(default_factory=Counter)
    _num_of_tenant: Counter[tuple[Priority, str]] = field(default_factory=Counter)
    _num_kept: Counter[str] = field(default_factory=Counter)
    """By model: those that could not start when they came."""

    def __post_init__(self) -> None:
        self.prospects = Prospects(self.config, self.cluster)

    def entries(self) -> Iterator[RequestEntry]:
        for queue in self.waiting.values():
            yield from queue.all()

    def num_of_model(self, model: str) -> int:
        """How many wait, continuations included."""
        queue = self.waiting.get(model)
        return len(queue) if queue is not None else 0

    def num_of_class(self, priority: Priority) -> int:
        """How many of the class wait, less the continuations."""
        return self._num_of_class[priority]

    def max_of_class(self, priority: Priority) -> int:
        """How many of the class may wait."""
        return self.config.priorities.max_queued_of(priority, self.config.max_queued_requests)

    # ---- coming ---------------------------------------------------------------------------------

    def enqueue(self, entry: RequestEntry) -> None:
        """A newly submitted request, at its place."""
        entry.outlook = self.prospects.outlook(entry)
        self._queue_of(entry).add(entry)
        self._num_of_class[entry.terms.priority] += 1
        self._num_of_tenant[entry.terms.priority, entry.terms.tenant] += 1

    def enqueue_first(self, entry: RequestEntry) -> None:
        """A continuation, before all others of its model."""
        entry.outlook = replace(
            entry.outlook, ttft_deadline_s=math.inf, hopeless_s=math.inf, has_waited=False
        )
        self._queue_of(entry).add_first(entry)

    def keep_waiting(self, entry: RequestEntry, prefill_s: float | None, now_s: float) -> KVRelayError | None:
        """It could not start at once. `prefill_s` is what its prefill takes, where the policy knows. Returns
        why it may not wait, or None if it may."""
        queue = self.waiting[entry.model]
        queue.remove(entry)
        entry.outlook = self.prospects.outlook(entry, prefill_s)
        queue.add(entry)
        entry.outlook = self.prospects.with_wait(entry, queue, now_s)
        self._note_time(entry.model, now_s)
        self._num_kept[entry.model] += 1
        error = self._bound_error(entry.terms)
        if error is None and self.prospects.is_in_vain(entry, now_s):
            error = self._in_vain(entry, now_s)
        return error

    def _queue_of(self, entry: RequestEntry) -> FairQueue[RequestEntry]:
        assert entry.state is RequestState.QUEUED
        self.num_queued += 1
        queue = self.waiting.get(entry.model)
        if queue is None:
            queue = self.waiting[entry.model] = FairQueue(self.config.priorities)
        return queue

    def _bound_error(self, terms: ServiceTerms) -> KVRelayError | None:
        """The one that asks is counted already. A tenant may have so much of a class's room, for what is left
        of it: so there is always some left for others."""
        priority, share = terms.priority, self.config.max_tenant_share
        most, number = self.max_of_class(priority), self._num_of_class[priority]
        if number > most:
            text = f"{most} requests of priority {priority} wait already"
            return self.refuse(terms, Refusal.FULL, text)
        own = self._num_of_tenant[priority, terms.tenant]
        left = most - (number - 1)
        if terms.tenant and share < 1.0 and own > max(1.0, share / (1.0 - share) * left):
            text = f"{own - 1} requests of tenant {terms.tenant!r} and priority {priority} wait already"
            return self.refuse(terms, Refusal.TENANT, text)
        return None

    def _in_vain(self, entry: RequestEntry, now_s: float) -> KVRelayError | None:
        if self.rng.random() < self.config.trial_share:
            self.counts.num_trials += 1
            entry.outlook = replace(entry.outlook, is_trial=True, hopeless_s=math.inf)
            return None
        wait_s = entry.outlook.wait_s
        text = f"it would wait for about {wait_s:.3g} s, and be too late for its deadline"
        return self.refuse(entry.terms, Refusal.DEADLINE, text, wait_s)

    # ---- going ----------------------------------------------------------------------------------

    def remove(self, entry: RequestEntry, now_s: float) -> None:
        """It waits no more, whatever the reason."""
        queue, terms = self.waiting[entry.model], entry.terms
        if entry.serial not in queue.front:
            self._num_of_class[terms.priority] -= 1
            key = terms.priority, terms.tenant
            self._num_of_tenant[key] -= 1
            if not self._num_of_tenant[key]:
                del self._num_of_tenant[key]
            if entry.outlook.has_waited:
                self._note_time(entry.model, now_s)
                self._num_kept[entry.model] -= 1
                self._note_time(entry.model, now_s)
        queue.remove(entry)
        self.num_queued -= 1
        if not len(queue):
            del self.waiting[entry.model]

    def start(self, entry: RequestEntry, decision: Decision, now_s: float) -> None:
        """It is sent to its nodes: charge who asked for it, and let it out of the queue."""
        queue, outlook = self.waiting[entry.model], entry.outlook
        drain = self.prospects.forecast(entry.model).drain
        if entry.serial not in queue.front:
            queue.charge(entry.terms, outlook.work_s)
        if self._num_kept[entry.model]:
            self._note_time(entry.model, now_s)
            drain.note_started(outlook.work_s)
        if outlook.has_waited:
            drain.note_waited(now_s - entry.queued_since_s, outlook.wait_s, outlook.work_s)
        self.remove(entry, now_s)
        entry.outlook = self.prospects.placed(entry, decision, now_s)

    def _note_time(self, model: str, now_s: float) -> None:
        """Tell the drain rate how long somebody has been waiting."""
        forecast = self.prospects.forecast(model)
        if self._num_kept[model]:
            forecast.drain.note_waiting(forecast.num_prefill_nodes, now_s)
        else:
            del self._num_kept[model]
            forecast.drain.note_empty()

    # ---- refusing -------------------------------------------------------------------------------

    def late_error(self, entry: RequestEntry, decision: Decision | None, now_s: float) -> KVRelayError | None:
        """Why a request that waits is given up, at the moment at which it could be placed by `decision`, or
        as time goes by (None); None if it is not."""
        outlook = entry.outlook
        if entry.first_dispatch_s is not None:
            return None
        if outlook.is_trial:
            return self._trial_error(entry, now_s)
        is_over = now_s > outlook.hopeless_s
        if not is_over and (decision is None or not self.prospects.is_too_late(entry, decision, now_s)):
            return None
        waited_s = now_s - entry.queued_since_s
        drain = self.prospects.forecast(entry.model).drain
        if outlook.has_waited:
            drain.note_given_up(outlook.wait_s, outlook.work_s)
        if waited_s > 0.0:
            text = f"after {waited_s:.3g} s in the queue it would be too late for its deadline"
            return self.refuse(entry.terms, Refusal.DROPPED, text, outlook.wait_s)
        if not is_over and decision is not None:
            busy_s = self.prospects.ttft_s(entry, decision)
            text = f"its node would need {busy_s:.3g} s until its first token, too late for its deadline"
            return self.refuse(entry.terms, Refusal.DEADLINE, text, busy_s)
        self.counts.refused[entry.terms.priority, Refusal.DEADLINE] += 1
        return DeadlineExceeded("it would be too late for its deadline even if it started now")

    def _trial_error(self, entry: RequestEntry, now_s: float) -> KVRelayError | None:
        """A trial is over when its time is."""
        if now_s <= entry.outlook.ttft_deadline_s:
            return None
        return self.refuse(entry.terms, Refusal.DROPPED, "its first token would be too late")

    def refuse(
        self, terms: ServiceTerms, reason: Refusal, text: str, wait_s: float | None = None
    ) -> Overloaded:
        """Count a refusal. Its error says when to come back: when what waits now, or would have had to wait
        for `wait_s`, should be through."""
        self.counts.refused[terms.priority, reason] += 1
        if wait_s is None:
            forecasts = [self.prospects.forecast(model).drain for model in self.waiting]
            wait_s = max((drain.mean_start_s * self.num_queued for drain in forecasts), default=0.0)
        low, high = self.config.min_retry_after_s, self.config.max_retry_after_s
        return Overloaded(text, retry_after_s=min(max(wait_s, low), high))

    # ---- what is learned ------------------------------------------------------------------------

    def note_prefilled(self, entry: RequestEntry, report: PrefillFinished, now_s: float) -> None:
        """The prefill of the current attempt is computed."""
        self._correct(entry, self.prospects.note_prefilled(entry, report, now_s))

    def note_complete(self, entry: RequestEntry, now_s: float) -> None:
        """The answer is complete, and delivered."""
        self._correct(entry, self.prospects.note_complete(entry, now_s))
        outlook, first_s = entry.outlook, entry.merge.first_token_s
        if outlook.is_trial and first_s is not None:
            self.counts.num_trials_in_time += first_s <= outlook.ttft_deadline_s

    def _correct(self, entry: RequestEntry, work_s: float) -> None:
        """Work that was not what was charged for it."""
        queue = self.waiting.get(entry.model)
        if queue is not None and entry.num_attempts == 1:
            queue.charge(entry.terms, work_s)
