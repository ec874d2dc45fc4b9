"""How many requests of one client are under way at once; bounded."""

from __future__ import annotations

from kvrelay.core.errors import Overloaded


class InFlight:
    """A counter with a limit, used on one event loop."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self.num_requests = 0

    def enter(self) -> None:
        """Count one more.

        Raises:
            Overloaded: the limit is reached.
        """
        if self.num_requests >= self._max_requests:
            raise Overloaded(f"{self.num_requests} requests are in flight already (max_requests_in_flight)")
        self.num_requests += 1

    def leave(self) -> None:
        """Count one less."""
        assert self.num_requests > 0
        self.num_requests -= 1
