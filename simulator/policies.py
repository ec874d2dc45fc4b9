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

MakePolicy = Callable[[PrefixSource, CostModel], FleetPolicy]

POLICIES: Final[Mapping[str, MakePolicy]] = {
    "kvrelay": lambda source, costs: PrefixAware(source),
    "random": lambda source, costs: RandomNode(source),
    "round-robin": lambda source, costs: RoundRobin(source),
    "least-loaded": LeastLoadedPrefill,
    "consistent-hash": lambda source, costs: ConsistentHash(source),
    "sglang": lambda source, costs: SGLangCacheAware(source),
    "dynamo": lambda source, costs: DynamoCost(source),
    "mooncake": MooncakeMinTTFT,
    "mooncake-pull": MooncakePull,
}
"""The baselines that predict times are given the cost model itself; `kvrelay` learns."""


def make_policy(name: str, source: PrefixSource, costs: CostModel) -> FleetPolicy:
    """A new policy.

    Raises:
        ConfigError: there is none of that name.
    """
    make = POLICIES.get(name)
    if make is None:
        raise ConfigError(f"policy {name!r} is unknown; known: {', '.join(POLICIES)}", field="policy")
    return make(source, costs)
