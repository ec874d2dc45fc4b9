"""Policies that know neither caches nor load."""

from __future__ import annotations

from random import Random

import numpy as np

from kvrelay.router.fleet_policy import PrefillChoice, SingleFleetPolicy
from kvrelay.router.placement import PlacementRequest
from kvrelay.router.prefill_fleet import PrefillFleet
from kvrelay.router.prefix_source import PrefixSource
from kvrelay.simulator.baselines.baseline import Prompt


class RandomNode(SingleFleetPolicy):
    """Any node, each with equal probability."""

    @property
    def name(self) -> str:
        return "random"

    def choose_prefill(
        self, request: PlacementRequest, fleet: PrefillFleet, now_s: float, rng: Random
    ) -> PrefillChoice:
        """See `SingleFleetPolicy`."""
        slots = np.flatnonzero(fleet.is_open)
        return Prompt(request, fleet).on(int(slots[rng.randrange(len(slots))]))


class RoundRobin(SingleFleetPolicy):
    """One node after another."""

    def __init__(self, source: PrefixSource) -> None:
        super().__init__(source)
        self._next = 0

    @property
    def name(self) -> str:
        return "round-robin"

    def choose_prefill(
        self, request: PlacementRequest, fleet: PrefillFleet, now_s: float, rng: Random
    ) -> PrefillChoice:
        """See `SingleFleetPolicy`."""
        slots = np.flatnonzero(fleet.is_open)
        slot = int(slots[self._next % len(slots)])
        self._next += 1
        return Prompt(request, fleet).on(slot)
