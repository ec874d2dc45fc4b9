"""Comes back to the core when it wants to look at its queue again."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final

MIN_PAUSE_S: Final = 0.002
"""A look at a long queue takes some tenths of a millisecond."""


class LookTimer:
    """At most one call of `look` is planned at a time, the earliest that was asked for."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self._due_s = math.inf
        self._handle: asyncio.TimerHandle | None = None

    def ask(self, due_s: float, now_s: float) -> None:
        """Call `look` at `due_s`, if nothing is planned for an earlier time; infinite: never."""
        if due_s >= self._due_s:
            return
        if self._handle is not None:
            self._handle.cancel()
        self._due_s = due_s
        pause_s = max(MIN_PAUSE_S, due_s - now_s)
        self._handle = asyncio.get_running_loop().call_later(pause_s, self._on_due)

    def _on_due(self) -> None:
        self._due_s, self._handle = math.inf, None
        self._look()
