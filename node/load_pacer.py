"""When a router is told of a node's load: after a change, but not too often, and with every heartbeat."""

from __future__ import annotations

from kvrelay.core.node_messages import NodeLoad


class LoadPacer:
    """Pure; one for each stream."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._last: NodeLoad | None = None
        self._last_s = float("-inf")

    def due_in_s(self, now_s: float) -> float:
        """How long until a change may be told; 0 if it may be now."""
        return max(0.0, self._last_s + self._interval_s - now_s)

    def take(self, load: NodeLoad, now_s: float, *, is_heartbeat: bool = False) -> NodeLoad | None:
        """`load` if it is to be sent now: it has changed, and what was sent last is old enough."""
        if not is_heartbeat and (load == self._last or self.due_in_s(now_s) > 0.0):
            return None
        self._last, self._last_s = load, now_s
        return load
