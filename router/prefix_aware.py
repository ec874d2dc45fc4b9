"""The policy `kvrelay`: least predicted time to first token, less what a choice costs all others.

A prefill node's score for a request is ``queue + pull + prefill + w * (pull + prefill)``, in seconds:

- *queue*: until the node would start on it; *pull*: to fetch what another node holds of its prefix, where
  that is quicker than to compute it; *prefill*: to compute the rest. All are learned (`learned_costs`), as is
  what messages take, which is the same for all nodes.
- *w* is what a second of work costs the others (`congestion`): nothing while nodes are idle, so that the
  choice is greedy, and much when the cluster saturates, when saved work counts more than this one's time.

Requests are bound late. One goes to a node only when that node is about to be idle: while its best node is
busy it waits here, where it can still take another, and where others may pass. Which of the waiting ones is
next is decided by the highest response ratio, waited over work: short work, and with it work that caches
save, goes first, and nobody starves.

Source: the score without *w* is Mooncake's (Qin et al., FAST 2025, section 6.1); highest response ratio next
is Brinch Hansen's (1971). See docs/placement.md.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Final

import numpy as np

from kvrelay.core.ids import RequestId
from kvrelay.router.congestion import Congestion
from kvrelay.router.decode_fleet import DecodeChoice, DecodeFleet
from kvrelay.router.fleet_policy import FleetPolicy, PlannedPrefill
from kvrelay.router.lazy_candidates import LazyCandidates
from kvrelay.router.online_fit import Floats
from kvrelay.router.placement import (
    ClusterView,
    Decision,
    Pick,
    PlacementRequest,
    WaitingRequests,
)
from kvrelay.router.prefill_choice import Moment, best_slot, prefill_candidates
from kvrelay.router.prefill_fleet import PrefillFleet
from kvrelay.router.prefill_options import PrefillOptions, prefill_options
from kvrelay.router.prefix_source import PrefixSource

_MAX_CONSIDERED: Final = 64
"""Of the requests that wait, so many of the oldest are looked at."""
_OPTIONS_AGE_S: Final = 1.0
"""What caches hold for a waiting request is looked up again after this, and always before it is placed."""
_MIN_PAUSE_S: Final = 0.0005
"""Before a node is looked at again, so that rounding can't make it no pause at all."""
_MAX_REMEMBERED: Final = 1024


@dataclass(frozen=True, slots=True, eq=False)
class _Parked:
    """A request that waits for a busy node though another is idle: for which, until when, for how long it
    will keep that busy, and what the least work would be."""

    fleet: PrefillFleet
    slot: int
    until_s: float
    work_s: float
    least_work_s: float


class PrefixAware(FleetPolicy):
    """See the module."""

    def __init__(self, source: PrefixSource) -> None:
        super().__init__(source)
        self._congestion = Congestion()
        self._options: OrderedDict[RequestId, tuple[PrefillFleet, float, PrefillOptions]] = OrderedDict()
        """When and for which fleet they were looked up, of the requests that wait."""
        self._parked: OrderedDict[RequestId, _Parked] = OrderedDict()
        self._barren_scene: tuple[str, int, int] | None = None
        """How many waited of which model, and what had changed, when nothing could be placed; good until
        `_barren_until_s`."""
        self._barren_until_s = 0.0
        self.look_again_s = math.inf

    @property
    def name(self) -> str:
        return "kvrelay"

    def reconsider(self) -> None:
        """See `FleetPolicy`."""
        self._options.clear()
        self._parked.clear()
        self._barren_scene = None

    def choose(
        self, request: PlacementRequest, cluster: ClusterView, now_s: float, rng: Random
    ) -> Decision | None:
        """See `FirstComePolicy.choose`."""
        picked = self.pick((request,), cluster, now_s, rng)
        return picked.decision if picked else None

    def pick(self, waiting: WaitingRequests, cluster: ClusterView, now_s: float, rng: Random) -> Pick | None:
        """See `PlacementPolicy.pick`, and the module."""
        self.look_again_s = math.inf
        first = next(iter(waiting), None)
        if first is None:
            return None
        num_waiting = len(waiting)
        scene = first.model, num_waiting, self.num_changes
        if scene == self._barren_scene and now_s < self._barren_until_s:
            self.look_again_s = self._barren_until_s
            return None
        self._barren_scene, self._barren_until_s = scene, now_s + _OPTIONS_AGE_S
        considered: list[PlacementRequest] = []
        for prefill, decode in self.fleets(first.model):
            backlog_s = prefill.backlog_s(now_s)
            busy_s = float(backlog_s[backlog_s.argmin()]) - prefill.longest_lead_s
            if busy_s > 0.0:
                self._note_barren_for(busy_s, now_s)
                continue
            considered = considered or list(islice(waiting, _MAX_CONSIDERED))
            picked = self._pick_in(prefill, decode, considered, backlog_s, num_waiting, now_s, rng)
            if picked is not None:
                return picked
        if considered and len(considered) < min(num_waiting, _MAX_CONSIDERED):
            self._barren_scene = None  # some wait for a pause to end, and nobody says when
        elif self._barren_scene is not None:
            self.look_again_s = self._barren_until_s
        return None

    def prefill_s(self, request: PlacementRequest, now_s: float) -> float | None:
        """See `PlacementPolicy`; looked up anew at most once in a while."""
        found = [
            self._options_of(request, prefill, decode, now_s, _OPTIONS_AGE_S).least_work_s
            for prefill, decode in self.fleets(request.model)
        ]
        return min(found, default=None)

    def _note_barren_for(self, seconds: float, now_s: float) -> None:
        self._barren_until_s = min(self._barren_until_s, now_s + max(seconds, _MIN_PAUSE_S))

    def _pick_in(
        self,
        prefill: PrefillFleet,
        decode: DecodeFleet,
        considered: list[PlacementRequest],
        backlog_s: Floats,
        num_waiting: int,
        now_s: float,
        rng: Random,
    ) -> Pick | None:
        is_idle = backlog_s <= prefill.lead_s
        num_idle = int(np.count_nonzero(is_idle))
        of_busy_s = np.where(is_idle, np.inf, backlog_s)
        self._note_barren_for(float(of_busy_s[of_busy_s.argmin()]) - prefill.lead_s, now_s)
        num_queued = num_waiting + prefill.num_behind - num_idle
        weight = self._congestion.weight(max(0, num_queued), prefill.slots.num_nodes)
        at = Moment(prefill, backlog_s, num_idle > 0, weight, num_waiting, now_s, rng)
        for request in self._ranked(considered, prefill, decode, now_s):
            if self._is_parked(request, at):
                continue
            objections: dict[int, str] = {}
            options = self._options_of(request, prefill, decode, now_s, _OPTIONS_AGE_S)
            score = at.score(options)
            slot = int(score.argmin())
            if backlog_s[slot] <= prefill.lead_for(options.work_s[slot]):
                fresh = self._options_of(request, prefill, decode, now_s, 0.0)
                if fresh is not options:
                    options, score = fresh, at.score(fresh)
                found = best_slot(request, options, score, objections, at)
                if found is None:
                    self._barren_scene = None
                    continue
                slot = found
            wait_s = float(backlog_s[slot]) - prefill.lead_for(options.work_s[slot])
            if wait_s > 0.0 and num_waiting <= _MAX_CONSIDERED:
                self._wait(request, slot, wait_s, options, at)
                continue
            self._barren_scene = None
            prefill_node = prefill.slots.node(slot).description.node_id
            choice = self.choose_decode(decode, request, prefill_node, options.match, now_s, rng)
            return None if choice is None else self._placed(request, options, slot, choice, objections, at)
        return None

    def _is_parked(self, request: PlacementRequest, at: Moment) -> bool:
        """Whether it goes on waiting for a busy node."""
        parked = self._parked.get(request.request_id)
        if parked is None or not at.has_idle or at.num_waiting > _MAX_CONSIDERED:
            return False
        if parked.fleet is not at.prefill or at.now_s >= parked.until_s:
            return False
        at.backlog_s[parked.slot] += parked.work_s
        self._note_barren_for(parked.until_s - at.now_s, at.now_s)
        return True

    def _wait(
        self, request: PlacementRequest, slot: int, wait_s: float, options: PrefillOptions, at: Moment
    ) -> None:
        """It would rather wait for a busy node. Chosen instead of an idle one, that is not looked at again
        before the node is expected to take it."""
        until_s = at.now_s + min(max(wait_s, _MIN_PAUSE_S), _OPTIONS_AGE_S)
        work_s = float(options.work_s[slot])
        self._note_barren_for(wait_s, at.now_s)
        if not at.has_idle or not np.isfinite(work_s):
            return
        at.backlog_s[slot] += work_s
        least_s = options.least_work_s
        self._parked[request.request_id] = _Parked(at.prefill, slot, until_s, work_s, least_s)
        if len(self._parked) > _MAX_REMEMBERED:
            self._parked.popitem(last=False)

    def _ranked(
        self, considered: list[PlacementRequest], prefill: PrefillFleet, decode: DecodeFleet, now_s: float
    ) -> list[PlacementRequest]:
        """Group by group, by response ratio, highest first; of equal ones the oldest."""
        if len(considered) < 2:
            return considered
        turns: dict[str, int] = {}
        keys = []
        for request in considered:
            known = self._parked.get(request.request_id)
            if known is None or known.fleet is not prefill or now_s >= known.until_s:
                least_s = self._options_of(request, prefill, decode, now_s, _OPTIONS_AGE_S).least_work_s
            else:
                least_s = known.least_work_s
            turn = turns.setdefault(request.group, len(turns))
            keys.append((turn, (request.submitted_s - now_s) / least_s))
        order = sorted(range(len(considered)), key=keys.__getitem__)
        return [considered[index] for index in order]

    def _options_of(
        self,
        request: PlacementRequest,
        prefill: PrefillFleet,
        decode: DecodeFleet,
        now_s: float,
        max_age_s: float,
    ) -> PrefillOptions:
        known = self._options.get(request.request_id)
        if known is not None:
            fleet, seen_s, options = known
            if fleet is prefill and now_s - seen_s <= max_age_s:
                return options
        options = prefill_options(prefill.keys(request), request.num_tokens, prefill, decode, now_s)
        self._options[request.request_id] = prefill, now_s, options
        if len(self._options) > _MAX_REMEMBERED:
            self._options.popitem(last=False)
        return options

    def _placed(
        self,
        request: PlacementRequest,
        options: PrefillOptions,
        slot: int,
        choice: DecodeChoice,
        objections: dict[int, str],
        at: Moment,
    ) -> Pick:
        prefill, slots, work_s = at.prefill, at.prefill.slots, float(options.work_s[slot])
        self._congestion.note_work(work_s, slots.num_nodes, at.now_s)
        self._options.pop(request.request_id, None)
        self._parked.pop(request.request_id, None)
        num_new = request.num_tokens - options.cached_tokens(slot)
        self.planned = PlannedPrefill(slot, num_new, work_s, options.num_new_blocks(slot), options.keys)
        holder = options.holder if options.does_pull[slot] else None
        decision = Decision(
            prefill_node=slots.node(slot).description.node_id,
            decode_node=choice.node.description.node_id,
            candidates=LazyCandidates(prefill_candidates(options, objections, at), choice.candidates),
            policy=self.name,
            predicted_ttft_s=float(at.backlog_s[slot]) + work_s + prefill.overhead_s,
            pull_from=holder,
            num_pull_tokens=int(options.pulled_tokens[slot]) if holder else 0,
        )
        return Pick(request, decision)
