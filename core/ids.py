"""Identifiers. All are opaque: nothing parses them back apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

RequestId = NewType("RequestId", str)
"""A client's request, unique in a router. Survives every attempt to serve it."""

NodeId = NewType("NodeId", str)
"""A prefill or decode node, unique in a cluster."""

AttemptId = NewType("AttemptId", int)
"""One try to serve a request on one (prefill, decode) pair. A counter in one router, from 1, never reused."""

BlockId = NewType("BlockId", int)
"""Index of a KV block in one node's block pool, 0 <= id < num_blocks."""


@dataclass(frozen=True, slots=True, order=True)
class TransferId:
    """Names one handoff in the whole cluster, for ever.

    ``router_epoch`` is 63 random bits drawn when a router process starts, ``attempt`` that router's
    counter: no two handoffs share the pair, so a late message of a dead one is recognised.
    """

    router_epoch: int
    attempt: AttemptId

    def __str__(self) -> str:
        return f"{self.router_epoch:016x}-{self.attempt}"
