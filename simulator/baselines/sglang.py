"""SGLang's cache-aware routing.

While load is balanced, a prompt of which some node has more than `CACHE_THRESHOLD` goes to the node that has
most of it, any other to the node that holds least, up to a full cache. Load is unbalanced when the most
loaded node has more than `BALANCE_ABS` requests more than the least loaded one, and more than `BALANCE_REL`
times as many: then the least loaded one gets it.

Source: sgl-project/sglang, sgl-router, policies/cache_aware.rs (cache_threshold, balance_abs_threshold and
balance_rel_threshold). It keeps its own approximate tree of what it routed; here it sees caches exactly.
"""

from __future__ import annotations

from random import Random
from typing import Final

import numpy as np

from kvrelay.router.fleet_policy import PrefillChoice, SingleFleetPolicy
from kvrelay.router.learned_costs import Ints
from kvrelay.router.placement import PlacementRequest
from kvrelay.router.prefill_fleet import PrefillFleet
from kvrelay.router.prefix_source import PrefixSource
from kvrelay.simulator.baselines.baseline import Prompt, least

CACHE_THRESHOLD: Final = 0.3
BALANCE_ABS: Final = 64
BALANCE_REL: Final = 1.5


class SGLangCacheAware(SingleFleetPolicy):
    """See the module."""

    def __init__(self, source: PrefixSource, max_tree_blocks: int) -> None:
        super().__init__(source)
        self._max_tree_blocks = max_tree_blocks
        self._routed_blocks: Ints = np.zeros(0, np.int64)

    @property
    def name(self) -> str:
        return "sglang"

    def choose_prefill(
        self, request: PlacementRequest, fleet: PrefillFleet, now_s: float, rng: Random
    ) -> PrefillChoice:
        """See `SingleFleetPolicy`."""
        prompt = Prompt(request, fleet)
        slot = self._slot(prompt, fleet, rng)
        self._routed_blocks[slot] += prompt.num_new_blocks(slot)
        return prompt.on(slot)

    def _slot(self, prompt: Prompt, fleet: PrefillFleet, rng: Random) -> int:
        if len(self._routed_blocks) < fleet.slots.size:
            more = np.zeros(fleet.slots.size - len(self._routed_blocks), np.int64)
            self._routed_blocks = np.concatenate([self._routed_blocks, more])
        loads = fleet.num_pending[fleet.is_open]
        most, fewest = int(loads.max()), int(loads.min())
        if most - fewest > BALANCE_ABS and most > BALANCE_REL * fewest:
            return least(fleet.num_pending, fleet, rng)
        if prompt.own_tokens.max() / prompt.num_tokens > CACHE_THRESHOLD:
            return least(-prompt.own_tokens, fleet, rng)
        trees = np.minimum(self._routed_blocks, self._max_tree_blocks) + fleet.pending_blocks
        return least(trees, fleet, rng)
