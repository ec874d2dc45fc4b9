"""The policy `kvrelay`: least predicted time to first token, less what a choice costs all others.

A prefill node's score for a request is ``queue + pull + prefill + w * (pull + prefill)``, in seconds:

- *queue*: until the node would start on it; *pull*: to fetch what another node holds of its prefix, where
  that is quicker than to compute it; *prefill*: to compute the rest. All are learned (`learned_costs`).
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

from collections import OrderedDict
from itertools import islice
from random import Random
from typing import Final

import numpy as np

from kvrelay.core.ids import RequestId
from kvrelay.core.node_messages import Role
from kvrelay.router.congestion import Congestion
from kvrelay.router.decode_fleet import DecodeChoice, DecodeFleet
from kvrelay.router.fleet_policy import FleetPolicy, PlannedPrefill
from kvrelay.router.lazy_candidates import CandidateColumns, LazyCandidates
from kvrelay.router.online_fit import Floats
from kvrelay.router.placement import ClusterView, Decision, Pick, PlacementRequest, WaitingRequests
from kvrelay.router.prefill_fleet import PrefillFleet
from kvrelay.router.prefill_options import PrefillOptions, prefill_options
from kvrelay.router.prefix_source import PrefixSource

_MAX_CONSIDERED: Final = 64
"""Of the requests that wait, so many of the oldest are looked at."""
_OPTIONS_AGE_S: Final = 1.0
"""What caches hold for a waiting request is looked up again after this, and always before it is placed."""
_LEAD_S: Final = 0.002
"""A node that has less than this to do counts as idle: its next prompt must reach it before it is. More costs
hits, as waiting prompts are bound before it is known what will be free."""
_MAX_REMEMBERED: Final = 1024
_NUM_DRAWN: Final = 16
"""Of nodes that are equal, so many are drawn, and the one that took in least of them is taken."""
_MAX_TRIES: Final = 8
"""Nodes that are asked for an objection before a request is left to wait."""


class PrefixAware(FleetPolicy):
    """See the module."""

    def __init__(self, source: PrefixSource) -> None:
        super().__init__(source)
        self._congestion = Congestion()
        self._options: OrderedDict[RequestId, tuple[float, PrefillOptions]] = OrderedDict()
        """When each was looked up, of the requests that wait."""
        self._parked: OrderedDict[RequestId, tuple[int, float, float]] = OrderedDict()
        """Of those that wait for a busy node: which, until when, and for how long they will keep it busy."""
        self._barren_scene: tuple[int, RequestId, bytes] | None = None
        """Who waited and which nodes were idle when nothing could be placed; good until `_barren_until_s`."""
        self._barren_until_s = 0.0

    @property
    def name(self) -> str:
        return "kvrelay"

    def choose(
        self, request: PlacementRequest, cluster: ClusterView, now_s: float, rng: Random
    ) -> Decision | None:
        """See `FirstComePolicy.choose`."""
        picked = self.pick((request,), cluster, now_s, rng)
        return picked.decision if picked else None

    def pick(self, waiting: WaitingRequests, cluster: ClusterView, now_s: float, rng: Random) -> Pick | None:
        """See `PlacementPolicy.pick`, and the module."""
        first = next(iter(waiting), None)
        if first is None:
            return None
        considered: list[PlacementRequest] = []
        for prefill, decode in self.fleets(first.model):
            backlog_s = prefill.backlog_s(now_s)
            if backlog_s.min() > _LEAD_S:
                continue
            considered = considered or list(islice(waiting, _MAX_CONSIDERED))
            picked = self._pick_in(prefill, decode, considered, backlog_s, len(waiting), now_s, rng)
            if picked is not None:
                return picked
        return None

    def prefill_s(self, request: PlacementRequest, now_s: float) -> float | None:
        """See `PlacementPolicy`; looked up anew at most once in a while."""
        found = [
            self._options_of(request, prefill, now_s, _OPTIONS_AGE_S).least_work_s
            for prefill, _ in self.fleets(request.model)
        ]
        return min(found, default=None)

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
        """`backlog_s` is changed: what would rather wait for a busy node is counted there."""
        is_idle = backlog_s <= _LEAD_S
        scene = (len(considered), considered[-1].request_id, is_idle.tobytes())
        if scene == self._barren_scene and now_s < self._barren_until_s:
            return None
        num_idle = int(is_idle.sum())
        num_queued = num_waiting + int(np.maximum(prefill.num_pending - 1, 0).sum()) - num_idle
        weight = self._congestion.weight(max(0, num_queued), prefill.slots.num_nodes)
        self._barren_until_s = now_s + _OPTIONS_AGE_S
        for request in self._ranked(considered, prefill, now_s):
            parked = self._parked.get(request.request_id)
            if parked is not None and now_s < parked[1] and num_waiting <= _MAX_CONSIDERED:
                backlog_s[parked[0]] += parked[2]
                continue
            options = self._options_of(request, prefill, now_s, _OPTIONS_AGE_S)
            slot = int((backlog_s + (1.0 + weight) * options.work_s).argmin())
            if backlog_s[slot] <= _LEAD_S:
                options = self._options_of(request, prefill, now_s, 0.0)
                found = self._best_slot(request, options, prefill, backlog_s, weight, now_s, rng)
                if found is None:
                    continue
                slot = found
            if backlog_s[slot] > _LEAD_S and num_waiting <= _MAX_CONSIDERED:
                self._park(request, slot, float(backlog_s[slot]), float(options.work_s[slot]), now_s)
                backlog_s[slot] += options.work_s[slot]
                continue
            choice = decode.choose(request, options.match, now_s, rng)
            if choice is None:
                return None
            return self._placed(request, options, slot, choice, prefill, backlog_s, weight, now_s)
        self._barren_scene = scene
        return None

    def _park(
        self, request: PlacementRequest, slot: int, backlog_s: float, work_s: float, now_s: float
    ) -> None:
        """It waits for a busy node: no need to look at it again before that one is expected to be idle."""
        until_s = now_s + min(max(0.0, backlog_s - _LEAD_S), _OPTIONS_AGE_S)
        self._parked[request.request_id] = slot, until_s, work_s
        self._barren_until_s = min(self._barren_until_s, until_s)
        if len(self._parked) > _MAX_REMEMBERED:
            self._parked.popitem(last=False)

    def _ranked(
        self, considered: list[PlacementRequest], prefill: PrefillFleet, now_s: float
    ) -> list[PlacementRequest]:
        """Group by group, by response ratio, highest first; of equal ones the oldest."""
        if len(considered) < 2:
            return considered
        turns: dict[str, int] = {}
        keys = []
        for request in considered:
            least_s = self._options_of(request, prefill, now_s, _OPTIONS_AGE_S).least_work_s
            turn = turns.setdefault(request.group, len(turns))
            keys.append((turn, (request.submitted_s - now_s) / least_s))
        order = sorted(range(len(considered)), key=keys.__getitem__)
        return [considered[index] for index in order]

    def _options_of(
        self, request: PlacementRequest, prefill: PrefillFleet, now_s: float, max_age_s: float
    ) -> PrefillOptions:
        known = self._options.get(request.request_id)
        if known is not None:
            seen_s, options = known
            if now_s - seen_s <= max_age_s and len(options.work_s) == prefill.slots.size:
                return options
        options = prefill_options(prefill.keys(request), request.num_tokens, prefill)
        self._options[request.request_id] = now_s, options
        if len(self._options) > _MAX_REMEMBERED:
            self._options.popitem(last=False)
        return options

    def _best_slot(
        self,
        request: PlacementRequest,
        options: PrefillOptions,
        prefill: PrefillFleet,
        backlog_s: Floats,
        weight: float,
        now_s: float,
        rng: Random,
    ) -> int | None:
        """The least-scored node; None: every one that is looked at objects."""
        score = backlog_s + (1.0 + weight) * options.work_s
        slots = prefill.slots
        if request.avoided:
            failed = [slots.slot_of[node_id] for node_id in request.avoided if node_id in slots.slot_of]
            if len(failed) < slots.num_nodes:
                score[failed] = np.inf
        for _ in range(_MAX_TRIES):
            best = int(score.argmin())
            if not np.isfinite(score[best]):
                return None
            slot = _among_equals(best, score, options, prefill, backlog_s, rng)
            if not slots.node(slot).objection(request, now_s):
                return slot
            score[slot] = np.inf
        return None

    def _placed(
        self,
        request: PlacementRequest,
        options: PrefillOptions,
        slot: int,
        choice: DecodeChoice,
        prefill: PrefillFleet,
        backlog_s: Floats,
        weight: float,
        now_s: float,
    ) -> Pick:
        slots, work_s = prefill.slots, float(options.work_s[slot])
        self._congestion.note_work(work_s, slots.num_nodes, now_s)
        self._options.pop(request.request_id, None)
        self._parked.pop(request.request_id, None)
        num_new = request.num_tokens - options.cached_tokens(slot)
        self.planned = PlannedPrefill(slot, num_new, work_s, options.num_new_blocks(slot), options.keys)
        holder = slots.node_ids[options.holder] if options.does_pull[slot] else None
        terms = (
            ("queue_s", backlog_s),
            ("pull_s", options.pull_s),
            ("prefill_s", options.work_s - options.pull_s),
            ("others_s", weight * options.work_s),
        )
        columns = CandidateColumns(
            Role.PREFILL, slots.node_ids, terms, (("cached_tokens", options.own_tokens),)
        )
        decision = Decision(
            prefill_node=slots.node(slot).description.node_id,
            decode_node=choice.node.description.node_id,
            candidates=LazyCandidates(columns, choice.columns),
            policy=self.name,
            predicted_ttft_s=float(backlog_s[slot]) + work_s,
            pull_from=holder,
            num_pull_tokens=int(options.pulled_tokens[slot]) if holder else 0,
        )
        return Pick(request, decision)


def _among_equals(
    best: int,
    score: Floats,
    options: PrefillOptions,
    prefill: PrefillFleet,
    backlog_s: Floats,
    rng: Random,
) -> int:
    """Of the nodes that differ from the best in nothing but what predictions are off by, some are drawn, so
    that routers which see the same do not all do the same; the one of these whose cache took in least gets
    it, so that all caches keep blocks for about the same time, as one large cache would."""
    within_s = prefill.costs.relative_error * float(options.work_s[best]) + 1e-9
    is_equal = score <= score[best] + within_s
    is_equal &= backlog_s <= max(float(backlog_s[best]), _LEAD_S)
    is_equal &= options.own_tokens == options.own_tokens[best]
    equals = np.flatnonzero(is_equal)
    if len(equals) < 2:
        return best
    drawn = equals[[rng.randrange(len(equals)) for _ in range(_NUM_DRAWN)]]
    return int(drawn[prefill.inserted_blocks[drawn].argmin()])
