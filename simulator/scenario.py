"""What is simulated: which cluster, which load, which policy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from kvrelay.core.errors import ConfigError
from kvrelay.core.service_terms import ServiceTerms
from kvrelay.router.config import RouterCoreConfig

MAX_NODES = 100_000
NEVER_S: Final = 1e12


@dataclass(frozen=True, slots=True)
class Scenario:
    """`num_decode_nodes` is 0 to leave decode out: a request ends with its first token.

    A request is refused that waits longer than `queue_timeout_s` at the router, or that comes while
    `max_queued` wait there; the defaults refuse none. The limits of goodput are on a request's time to first
    token, on 99 % of its own gaps between tokens, and on its whole time. With `has_deadlines` requests tell
    the router the first and the last of them, and it refuses those that it can't serve in time, but for a
    share of `trial_share` of them.

    Raises:
        ConfigError: with all faults, one a line.
    """

    num_prefill_nodes: int
    num_decode_nodes: int
    cache_blocks: int
    policy: str
    load: float
    seed: int = 0
    queue_timeout_s: float = 1e9
    max_queued: int = 10**9
    ttft_limit_s: float = 0.5
    itl_limit_s: float = 0.025
    total_limit_s: float = 1e9
    has_deadlines: bool = False
    trial_share: float = 0.02

    def __post_init__(self) -> None:
        faults = []
        for name, least, most in (
            ("num_prefill_nodes", 1, MAX_NODES),
            ("num_decode_nodes", 0, MAX_NODES),
            ("cache_blocks", 1, 10**9),
            ("max_queued", 1, 10**9),
        ):
            if not least <= getattr(self, name) <= most:
                faults.append(f"{name} must be from {least} to {most}, got {getattr(self, name)}")
        faults += [
            f"{name} must be above 0, got {getattr(self, name)}"
            for name in ("load", "queue_timeout_s", "ttft_limit_s", "itl_limit_s", "total_limit_s")
            if not 0.0 < getattr(self, name) <= 1e9
        ]
        if faults:
            raise ConfigError("\n".join(faults))

    @property
    def has_decode(self) -> bool:
        return self.num_decode_nodes > 0

    def asked_for(self, terms: ServiceTerms, now_s: float) -> tuple[ServiceTerms, float | None]:
        """The terms of a request that comes now, and its deadline: with the limits, if those are told."""
        if not self.has_deadlines:
            return terms, None
        deadline_s = now_s + self.total_limit_s if self.total_limit_s < 1e9 else None
        return replace(terms, ttft_timeout_s=self.ttft_limit_s), deadline_s

    def core_config(self) -> RouterCoreConfig:
        """No limit but those of the scenario: the policies are compared, not the limits."""
        return RouterCoreConfig(
            max_queued_requests=self.max_queued,
            max_tenant_share=1.0,
            trial_share=self.trial_share,
            queue_timeout_s=self.queue_timeout_s,
            node_wait_s=NEVER_S,
            node_silence_s=NEVER_S,
            default_deadline_s=NEVER_S,
            max_deadline_s=NEVER_S,
            max_prefill_requests_per_node=2**31,
            max_prefill_tokens_per_node=2**62,
        )
