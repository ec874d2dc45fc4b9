"""The queued requests of one model, as a policy sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kvrelay.router.fair_queue import FairQueue
from kvrelay.router.ledger import RequestEntry
from kvrelay.router.placement import PlacementRequest

_FIRST: Final = "first"
"""Continuations are a group of their own."""


@dataclass(frozen=True, slots=True, eq=False)
class WaitingEntries:
    """See `WaitingRequests`: without the continuations that wait for their pause."""

    entries: FairQueue[RequestEntry]
    growth_tokens: int
    now_s: float

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[PlacementRequest]:
        for entry in self.entries:
            if self.now_s >= entry.not_before_s:
                yield placement_request(entry, self.growth_tokens)


def placement_request(entry: RequestEntry, growth_tokens: int) -> PlacementRequest:
    """What a policy may know of an entry; made anew only when something changed, as a policy may look at the
    same queue often. Output of at most `growth_tokens` tokens is set aside room for."""
    request, placing = entry.continuation(), entry.placing
    group = entry.terms.priority.value if entry.first_dispatch_s is None else _FIRST
    if (
        placing is None
        or placing.token_ids is not request.token_ids
        or placing.avoided != entry.avoided
        or placing.group != group
    ):
        placing = entry.placing = PlacementRequest(
            request_id=entry.request_id,
            model=entry.model,
            token_ids=request.token_ids,
            num_growth_tokens=min(request.num_remaining_tokens, growth_tokens),
            cache_salt=request.cache_salt,
            avoided=entry.avoided,
            submitted_s=entry.submitted_s,
            group=group,
            blocks=entry.blocks(),
        )
    return placing
