"""Which prefill node one prompt goes to, of those that could take it at this moment."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final

import numpy as np

from kvrelay.core.node_messages import Role
from kvrelay.router.lazy_candidates import FAILED_BEFORE, TOO_LONG, CandidateColumns
from kvrelay.router.online_fit import Floats
from kvrelay.router.placement import PlacementRequest
from kvrelay.router.prefill_fleet import PrefillFleet
from kvrelay.router.prefill_options import PrefillOptions

_NUM_DRAWN: Final = 16
"""Of nodes that are equal, so many are drawn, and the one that took in least of them is taken."""
_MAX_TRIES: Final = 8
"""Nodes that are asked for an objection before a request is left to wait."""


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """What one choice is made of. `backlog_s` is changed: what would rather wait for a busy node is counted
    there."""

    prefill: PrefillFleet
    backlog_s: Floats
    has_idle: bool
    weight: float
    num_waiting: int
    now_s: float
    rng: Random


def candidate_columns(options: PrefillOptions, objections: dict[int, str], at: Moment) -> CandidateColumns:
    """All prefill nodes, as they looked."""
    prefill, is_able = at.prefill, np.isfinite(options.work_s)
    cached_tokens = np.where(options.does_pull, options.pulled_tokens, options.own_tokens)
    return CandidateColumns(
        Role.PREFILL,
        prefill.slots.node_ids,
        (
            ("queue_s", at.backlog_s),
            ("pull_s", options.pull_s),
            ("prefill_s", options.work_s - options.pull_s),
            ("others_s", at.weight * np.where(is_able, options.work_s, 0.0)),
            ("overhead_s", np.full(prefill.slots.size, prefill.overhead_s)),
        ),
        (("cached_tokens", cached_tokens), ("own_tokens", options.own_tokens)),
        (("it drains", ~prefill.is_open.copy()), (TOO_LONG, ~is_able)),
        objections,
    )


def best_slot(
    request: PlacementRequest, options: PrefillOptions, objections: dict[int, str], at: Moment
) -> int | None:
    """The least-scored node; None: every one that is looked at objects. Enters the `objections`."""
    score = at.backlog_s + (1.0 + at.weight) * options.work_s
    slots = at.prefill.slots
    failed = [slots.slot_of[node_id] for node_id in request.avoided if node_id in slots.slot_of]
    if np.isfinite(score[failed]).sum() < np.isfinite(score).sum():
        score[failed] = np.inf
        objections.update(dict.fromkeys(failed, FAILED_BEFORE))
    for _ in range(_MAX_TRIES):
        best = int(score.argmin())
        if not np.isfinite(score[best]):
            return None
        slot = _among_equals(best, score, options, at)
        objection = slots.node(slot).objection(request, at.now_s)
        if not objection:
            return slot
        score[slot] = np.inf
        objections[slot] = objection
    return None


def _among_equals(best: int, score: Floats, options: PrefillOptions, at: Moment) -> int:
    """Of the nodes that differ from the best in nothing but what predictions are off by, some are drawn, so
    that routers which see the same do not all do the same; the one of these whose cache took in least gets
    it, so that all caches keep blocks for about the same time, as one large cache would."""
    prefill, backlog_s = at.prefill, at.backlog_s
    within_s = prefill.costs.relative_error * float(options.work_s[best]) + 1e-9
    is_equal = score <= score[best] + within_s
    is_equal &= backlog_s <= max(float(backlog_s[best]), prefill.lead_s)
    is_equal &= options.own_tokens == options.own_tokens[best]
    equals = np.flatnonzero(is_equal)
    if len(equals) < 2:
        return best
    drawn = equals[[at.rng.randrange(len(equals)) for _ in range(_NUM_DRAWN)]]
    return int(drawn[prefill.inserted_blocks[drawn].argmin()])
