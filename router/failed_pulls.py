"""Which pairs of nodes failed to pull from each other lately: they are left alone for a while.

A link that is down, or a holder that no longer has what it said, costs each prompt that tries it a wait. A
pair's pause doubles with each failure in a row, and its first pull that works ends that.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from kvrelay.core.ids import NodeId

_FIRST_PAUSE_S: Final = 10.0
_MAX_DOUBLINGS: Final = 5
_MAX_PAIRS: Final = 1024
"""Those that failed longest ago are forgotten."""


class FailedPulls:
    """Pairs of a holder and a puller, each with its failures in a row and when its pause ends."""

    def __init__(self) -> None:
        self._pairs: OrderedDict[tuple[NodeId, NodeId], tuple[int, float]] = OrderedDict()

    def note(self, holder: NodeId, puller: NodeId, has_failed: bool, now_s: float) -> None:
        """A pull has come to its end."""
        num_before, _ = self._pairs.pop((holder, puller), (0, 0.0))
        if has_failed:
            until_s = now_s + _FIRST_PAUSE_S * 2.0 ** min(num_before, _MAX_DOUBLINGS)
            self._pairs[holder, puller] = num_before + 1, until_s
        if len(self._pairs) > _MAX_PAIRS:
            self._pairs.popitem(last=False)

    def pausing(self, holder: NodeId, now_s: float) -> list[NodeId]:
        """The nodes that are not to pull from this one now."""
        if not self._pairs:
            return []
        return [
            puller
            for (of_holder, puller), (_, until_s) in self._pairs.items()
            if of_holder == holder and now_s < until_s
        ]

    def forget(self, node_id: NodeId) -> None:
        """The node is gone; one that comes back under its name starts anew."""
        for pair in [pair for pair in self._pairs if node_id in pair]:
            del self._pairs[pair]
