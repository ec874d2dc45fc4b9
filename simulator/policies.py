"""The policies that can be simulated, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from kvrelay.core.errors import ConfigError
from kvrelay.router.fleet_policy import FleetPolicy
from kvrelay.router.prefix_aware import PrefixAware
from kvrelay.router.prefix_source import PrefixSource
from kvrelay.simulator.baselines.consistent_hash import ConsistentHash
from kvrelay.simulator.baselines.dynamo import DynamoCost
from kvrelay.simulator.baselines.least_loaded import LeastLoadedPrefill
from kvrelay.simulator.baselines.mooncake import MooncakeMinTTFT, MooncakePull
from kvrelay.simulator.baselines.sglang import SGLangCacheAware
from kvrelay.simulator.baselines.unaware import RandomNode, RoundRobin
from kvrelay.simulator.cost_model import CostModel

MakePolicy = Callable[[PrefixSource, CostModel, int], FleetPolicy]
"""From the prefixes, the cost model and the blocks of a node's cache."""

POLICIES: Final[Mapping[str, MakePolicy]] = {
    "kvrelay": lambda source, *_: PrefixAware(source),
    "random": lambda source, *_: RandomNode(source),
    "round-robin": lambda source, *_: RoundRobin(source),
    "least-loaded": lambda source, costs, _: LeastLoadedPrefill(source, costs),
    "consistent-hash": lambda source, *_: ConsistentHash(source),
    "sglang": lambda source, _, cache_blocks: SGLangCacheAware(source, cache_blocks),
    "dynamo": lambda source, *_: DynamoCost(source),
    "mooncake": lambda source, costs, _: MooncakeMinTTFT(source, costs),
    "mooncake-pull": lambda source, costs, _: MooncakePull(source, costs),
}
"""The baselines that predict times are given the cost model itself; `kvrelay` learns."""


def make_policy(name: str, source: PrefixSource, costs: CostModel, cache_blocks: int) -> FleetPolicy:
    """A new policy.

    Raises:
        ConfigError: there is none of that name.
    """
    make = POLICIES.get(name)
    if make is None:
        raise ConfigError(f"policy {name!r} is unknown; known: {', '.join(POLICIES)}", field="policy")
    return make(source, costs, cache_blocks)
