"""What the baselines share: how many of a prompt's tokens each node has, and ties at random."""

from __future__ import annotations

from random import Random

import numpy as np

from kvrelay.router.fleet_policy import PlannedPrefill, PrefillChoice
from kvrelay.router.learned_costs import Ints
from kvrelay.router.online_fit import Floats
from kvrelay.router.placement import PlacementRequest
from kvrelay.router.prefill_fleet import HeldBlocks, PrefillFleet


class Prompt:
    """A request as the baselines see it: `own_tokens`, by slot, are cached on each node, or will be when its
    turn comes."""

    def __init__(self, request: PlacementRequest, fleet: PrefillFleet) -> None:
        self.num_tokens = request.num_tokens
        self.keys = fleet.keys(request)
        self.held: HeldBlocks = fleet.held_blocks(self.keys)
        self.own_tokens: Ints = self.tokens(self.held.later, fleet)

    def tokens(self, blocks: Ints, fleet: PrefillFleet) -> Ints:
        """Tokens of so many leading blocks, never the whole prompt."""
        return np.minimum(blocks * fleet.block_size, self.num_tokens - 1)

    def num_new_blocks(self, slot: int) -> int:
        """Those that the node's cache has not got."""
        return len(self.keys) - int(self.held.later[slot])

    def on(self, slot: int, work_s: float = 0.0) -> PrefillChoice:
        """That node, with what its own cache has."""
        num_new = self.num_tokens - int(self.own_tokens[slot])
        return PrefillChoice(PlannedPrefill(slot, num_new, work_s, self.num_new_blocks(slot), self.keys))


def least(values: Floats | Ints, fleet: PrefillFleet, rng: Random) -> int:
    """The slot of the least value, of equal ones one at random."""
    of_present = np.where(fleet.is_open, values, np.inf)
    slots = np.flatnonzero(of_present <= of_present.min() + 1e-12)
    return int(slots[rng.randrange(len(slots))]) if len(slots) > 1 else int(slots[0])
