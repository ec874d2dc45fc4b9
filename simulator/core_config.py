"""The core of a simulated router, configured."""

from __future__ import annotations

from typing import Final

from kvrelay.router.config import RouterCoreConfig
from kvrelay.simulator.scenario import Scenario

_NEVER_S: Final = 1e12


def core_config(scenario: Scenario) -> RouterCoreConfig:
    """No limit but those of the scenario: the policies are compared, not the limits."""
    return RouterCoreConfig(
        max_queued_requests=scenario.max_queued,
        max_tenant_share=1.0,
        trial_share=scenario.trial_share,
        queue_timeout_s=scenario.queue_timeout_s,
        node_wait_s=_NEVER_S,
        node_silence_s=_NEVER_S,
        default_deadline_s=_NEVER_S,
        max_deadline_s=_NEVER_S,
        max_prefill_requests_per_node=2**31,
        max_prefill_tokens_per_node=2**62,
    )
