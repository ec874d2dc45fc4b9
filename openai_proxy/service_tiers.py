"""OpenAI's service tiers as priorities, and whose a request is."""

from __future__ import annotations

import hashlib
from typing import Final

from kvrelay.core.service_terms import MAX_TENANT_CHARS, Priority
from kvrelay.openai_proxy.access import Grant
from kvrelay.openai_proxy.schema.base import ServiceTier

_PRIORITY_OF_TIER: Final[dict[ServiceTier, Priority]] = {
    "auto": Priority.NORMAL,
    "default": Priority.NORMAL,
    "priority": Priority.HIGH,
    "flex": Priority.LOW,
}
_TIER_OF_PRIORITY: Final = {Priority.HIGH: "priority", Priority.NORMAL: "default", Priority.LOW: "flex"}


def priority_of(tier: ServiceTier, grant: Grant) -> Priority:
    """What a request that asks for `tier` is served with."""
    return grant.priority(_PRIORITY_OF_TIER[tier])


def served_tier(tier: ServiceTier, grant: Grant) -> str:
    """The tier that a request gets, which is less than it asked for where its key allows no more."""
    return _TIER_OF_PRIORITY[priority_of(tier, grant)]


def tenant_name(given: str) -> str:
    """What routers call a tenant; a name that they would not take becomes its hash."""
    if len(given) <= MAX_TENANT_CHARS and given.isprintable():
        return given
    return hashlib.sha256(given.encode(errors="replace")).hexdigest()
