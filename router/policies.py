"""The policies that a router can place by, by name."""

from __future__ import annotations

from kvrelay.router.block_index import BlockIndex
from kvrelay.router.config import Placement
from kvrelay.router.least_loaded import LeastLoaded
from kvrelay.router.placement import PlacementPolicy
from kvrelay.router.prefix_aware import PrefixAware
from kvrelay.router.prefix_source import IndexedPrefixes
from kvrelay.router.round_robin import RoundRobin


def make_policy(name: Placement, index: BlockIndex) -> PlacementPolicy:
    """A new policy; `index` is kept by the core that is to ask it."""
    match name:
        case "kvrelay":
            return PrefixAware(IndexedPrefixes(index))
        case "least-loaded":
            return LeastLoaded()
        case "round-robin":
            return RoundRobin()
