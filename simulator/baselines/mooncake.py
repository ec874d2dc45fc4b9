"""Mooncake's cache-aware choice: the least predicted time to first token, with and without pulling.

``queue + prefill`` with the node's own prefix, or ``queue + transfer + prefill`` with the best holder's, the
lesser of both where pulls are allowed. Times are the cost model's own, so nothing is mispredicted.

Source: Qin et al., Mooncake (FAST 2025), section 6.1 and algorithm 1; its threshold for balancing is replaced
by comparing the two times.
"""

from __future__ import annotations

from random import Random

import numpy as np

from kvrelay.router.fleet_policy import PlannedPrefill, PrefillChoice, SingleFleetPolicy
from kvrelay.router.placement import PlacementRequest
from kvrelay.router.prefill_fleet import PrefillFleet
from kvrelay.router.prefix_source import PrefixSource
from kvrelay.simulator.baselines.baseline import Prompt, least
from kvrelay.simulator.cost_model import CostModel


class MooncakeMinTTFT(SingleFleetPolicy):
    """Without pulls."""

    def __init__(self, source: PrefixSource, costs: CostModel) -> None:
        super().__init__(source)
        self._costs = costs

    @property
    def name(self) -> str:
        return "mooncake"

    def choose_prefill(
        self, request: PlacementRequest, fleet: PrefillFleet, now_s: float, rng: Random
    ) -> PrefillChoice:
        """See `SingleFleetPolicy`."""
        prompt = Prompt(request, fleet)
        own_s = self._costs.prefill.seconds(prompt.num_tokens, prompt.own_tokens)
        slot = least(fleet.backlog_s(now_s) + own_s, fleet, rng)
        return prompt.on(slot, float(own_s[slot]))


class MooncakePull(MooncakeMinTTFT):
    """With pulls."""

    @property
    def name(self) -> str:
        return "mooncake-pull"

    def choose_prefill(
        self, request: PlacementRequest, fleet: PrefillFleet, now_s: float, rng: Random
    ) -> PrefillChoice:
        """See `SingleFleetPolicy`."""
        prompt, model, link = Prompt(request, fleet), self._costs.prefill, self._costs.link
        num_tokens = prompt.num_tokens
        best = prompt.tokens(prompt.held.now, fleet)
        holder = int(best.argmax())
        with_pull = np.maximum(prompt.own_tokens, best[holder])
        pulled = with_pull - prompt.own_tokens
        pull_s = np.where(pulled > 0, link.pull_base_s + link.pull_token_s * pulled, 0.0)
        own_s = model.seconds(num_tokens, prompt.own_tokens)
        pulled_s = pull_s + model.seconds(num_tokens, with_pull)
        work_s = np.minimum(own_s, pulled_s)
        slot = least(fleet.backlog_s(now_s) + work_s, fleet, rng)
        if pulled_s[slot] >= own_s[slot]:
            return prompt.on(slot, float(own_s[slot]))
        planned = PlannedPrefill(
            slot,
            prompt.num_tokens - int(with_pull[slot]),
            float(pulled_s[slot]),
            prompt.num_new_blocks(slot),
            prompt.keys,
        )
        holder_id = fleet.slots.node(holder).description.node_id
        return PrefillChoice(planned, holder_id, int(best[holder]))
