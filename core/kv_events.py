"""What a node says about the KV blocks that it holds, for whoever keeps an index of them."""

from __future__ import annotations

from enum import StrEnum


class Tier(StrEnum):
    """Where a node holds a block: in the cache that it computes from, or in host memory behind that."""

    DEVICE = "device"
    HOST = "host"
