"""The real clock of a node's shell."""

from __future__ import annotations

import time


class MonotonicClock:
    """`Clock` over the machine's monotonic clock."""

    def now_s(self) -> float:
        """Seconds since an arbitrary origin."""
        return time.monotonic()
