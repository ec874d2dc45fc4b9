"""Time, injected: the shells read a real clock, tests and the simulator a virtual one."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Where a shell reads the time."""

    def now_s(self) -> float:
        """Seconds since an arbitrary origin; never goes back."""
        ...
