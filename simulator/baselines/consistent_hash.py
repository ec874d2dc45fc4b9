"""Consistent hashing on the prompt's beginning, with bounded loads.

The hash is that of the prompt's first two blocks: all chats share the first one. A node takes no more than
1.25 times the mean of what is pending; what finds its node full goes to the next on the ring.

Source: Mirrokni, Thorup and Zadimoghaddam, Consistent Hashing with Bounded Loads (SODA 2018).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from hashlib import blake2b
from random import Random
from typing import Final

from kvrelay.core.ids import NodeId
from kvrelay.router.fleet_policy import PrefillChoice, SingleFleetPolicy
from kvrelay.router.placement import PlacementRequest
from kvrelay.router.prefill_fleet import PrefillFleet
from kvrelay.router.prefix_source import PrefixSource
from kvrelay.simulator.baselines.baseline import Prompt

HASHED_BLOCKS: Final = 2
MAX_LOAD: Final = 1.25
_POINTS_PER_NODE: Final = 100


class ConsistentHash(SingleFleetPolicy):
    """See the module."""

    def __init__(self, source: PrefixSource) -> None:
        super().__init__(source)
        self._of_nodes: tuple[NodeId | None, ...] = ()
        self._points: list[tuple[int, int]] = []

    @property
    def name(self) -> str:
        return "consistent-hash"

    def choose_prefill(
        self, request: PlacementRequest, fleet: PrefillFleet, now_s: float, rng: Random
    ) -> PrefillChoice:
        """See `SingleFleetPolicy`."""
        prompt = Prompt(request, fleet)
        if self._of_nodes is not fleet.slots.node_ids:
            self._draw_ring(fleet)
        key = prompt.keys[min(HASHED_BLOCKS, len(prompt.keys)) - 1]
        at = bisect_left(self._points, (_hash(f"key {key}"), 0))
        num_pending = int(fleet.num_pending.sum()) + 1
        most = math.ceil(MAX_LOAD * num_pending / fleet.slots.num_nodes)
        for step in range(len(self._points)):
            slot = self._points[(at + step) % len(self._points)][1]
            if fleet.num_pending[slot] < most:
                break
        return prompt.on(slot)

    def _draw_ring(self, fleet: PrefillFleet) -> None:
        self._of_nodes = fleet.slots.node_ids
        self._points = sorted(
            (_hash(f"{node_id} {point}"), slot)
            for slot, node_id in enumerate(self._of_nodes)
            if node_id is not None
            for point in range(_POINTS_PER_NODE)
        )


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
