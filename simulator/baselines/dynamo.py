"""Dynamo's KV router: ``overlap_weight * prefill blocks + decode blocks``, the least wins.

Prefill blocks: new tokens on their way through a node's prefill, this prompt's with them, in blocks. Decode
blocks: blocks that its sequences occupy, this prompt's with them. With the default weight of 1 and at
temperature 0, at which the least wins.

Source: ai-dynamo/dynamo, lib/llm/src/kv_router/scheduler.rs (DefaultWorkerSelector).
"""

from __future__ import annotations

from random import Random
from typing import Final

from kvrelay.router.fleet_policy import PrefillChoice, SingleFleetPolicy
from kvrelay.router.placement import PlacementRequest
from kvrelay.router.prefill_fleet import PrefillFleet
from kvrelay.simulator.baselines.baseline import Prompt, least

OVERLAP_WEIGHT: Final = 1.0


class DynamoCost(SingleFleetPolicy):
    """See the module."""

    @property
    def name(self) -> str:
        return "dynamo"

    def choose_prefill(
        self, request: PlacementRequest, fleet: PrefillFleet, now_s: float, rng: Random
    ) -> PrefillChoice:
        """See `SingleFleetPolicy`."""
        prompt = Prompt(request, fleet)
        new_tokens = fleet.pending_new_tokens + prompt.num_tokens - prompt.own_tokens
        decode_blocks = fleet.pending_blocks + len(prompt.keys)
        costs = OVERLAP_WEIGHT * new_tokens / fleet.block_size + decode_blocks
        return prompt.on(least(costs, fleet, rng))
