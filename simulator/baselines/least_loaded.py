"""The node with the least work ahead of it."""

from __future__ import annotations

from random import Random

from kvrelay.router.fleet_policy import PrefillChoice, SingleFleetPolicy
from kvrelay.router.placement import PlacementRequest
from kvrelay.router.prefill_fleet import PrefillFleet
from kvrelay.router.prefix_source import PrefixSource
from kvrelay.simulator.baselines.baseline import Prompt, least
from kvrelay.simulator.cost_model import CostModel


class LeastLoadedPrefill(SingleFleetPolicy):
    """The node whose queue, by the cost model, is the shortest in seconds, whatever is cached."""

    def __init__(self, source: PrefixSource, costs: CostModel) -> None:
        super().__init__(source)
        self._costs = costs

    @property
    def name(self) -> str:
        return "least-loaded"

    def choose_prefill(
        self, request: PlacementRequest, fleet: PrefillFleet, now_s: float, rng: Random
    ) -> PrefillChoice:
        """See `SingleFleetPolicy`."""
        prompt = Prompt(request, fleet)
        slot = least(fleet.backlog_s(now_s), fleet, rng)
        work_s = self._costs.prefill.one(prompt.num_tokens, int(prompt.own_tokens[slot]))
        return prompt.on(slot, work_s)
