"""Which prefill node one prompt goes to, of those that could take it at this moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

import numpy as np

from kvrelay.core.node_messages import Role
from kvrelay.router.lazy_candidates import TOO_LONG, CandidateColumns, exclude_failed
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

    def score(self, options: PrefillOptions) -> Floats:
        """By slot, seconds: the node's backlog and the work, with what the work costs others."""
        score: Floats = (1.0 + self.weight) * options.work_s
        score += self.backlog_s
        return score


def prefill_candidates(
    options: PrefillOptions, objections: dict[int, str], at: Moment
) -> Callable[[], CandidateColumns]:
    """All prefill nodes, as they look now, for whoever asks later."""
    prefill, backlog_s, weight = at.prefill, at.backlog_s, at.weight
    node_ids, overhead_s, is_open = prefill.slots.node_ids, prefill.overhead_s, prefill.is_open.copy()

    def columns() -> CandidateColumns:
        is_able = np.isfinite(options.work_s)
        cached_tokens = np.where(options.does_pull, options.pulled_tokens, options.own_tokens)
        return CandidateColumns(
            Role.PREFILL,
            node_ids,
            (
                ("queue_s", backlog_s),
                ("pull_s", options.pull_s),
                ("prefill_s", options.work_s - options.pull_s),
                ("others_s", weight * np.where(is_able, options.work_s, 0.0)),
                ("overhead_s", np.full(len(node_ids), overhead_s)),
            ),
            (("cached_tokens", cached_tokens), ("own_tokens", options.own_tokens)),
            (("it drains", ~is_open), (TOO_LONG, ~is_able)),
            objections,
        )

    return columns


def best_slot(
    request: PlacementRequest,
    options: PrefillOptions,
    score: Floats,
    objections: dict[int, str],
    at: Moment,
) -> int | None:
    """The least-scored node; None: every one that is looked at objects. Changes the `score` of those that
    do, and enters the `objections`."""
    slots = at.prefill.slots
    exclude_failed(request, slots, score, objections)
    for _ in range(_MAX_TRIES):
        best = int(score.argmin())
        if score[best] == np.inf:
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
    (equals,) = is_equal.nonzero()
    if len(equals) < 2:
        return best
    drawn = equals[_drawn(len(equals), at.rng)]
    return int(drawn[prefill.inserted_blocks[drawn].argmin()])


def _drawn(num: int, rng: Random) -> list[int]:
    """`_NUM_DRAWN` numbers below `num`: those that `randrange` would draw, in a quarter of its time."""
    num_bits, draw, drawn = num.bit_length(), rng.getrandbits, list[int]()
    while len(drawn) < _NUM_DRAWN:
        number = draw(num_bits)
        if number < num:
            drawn.append(number)
    return drawn
