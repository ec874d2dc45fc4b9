"""A running service's signs of life for its service manager."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from kvrelay.node.sd_notify import Notifier

logger = logging.getLogger(__name__)

STATUS_INTERVAL_S: Final = 5.0
PATIENCE: Final = 0.5
"""The part of the watchdog's time that something may stand still before its pets are withheld."""
_BEATS_PER_WATCHDOG: Final = 4
_START_EXTENSION_S: Final = 60.0


@dataclass(slots=True)
class Pulse:
    """Tells `notifier` that the event loop turns, as long as everything else does, too.

    `stuck_for_s` says how long the slowest part of the service has stood still (0: none does), `describe`
    what it does at the moment, in a few words. Before `ready` the start-up is extended, beat by beat; after
    it the watchdog is petted.
    """

    notifier: Notifier
    stuck_for_s: Callable[[], float]
    describe: Callable[[], str]
    is_ready: bool = field(default=False, init=False)
    _was_stuck: bool = field(default=False, init=False)

    @property
    def interval_s(self) -> float:
        """Between two beats."""
        watchdog_s = self.notifier.watchdog_s
        return STATUS_INTERVAL_S if watchdog_s is None else watchdog_s / _BEATS_PER_WATCHDOG

    def ready(self) -> None:
        """The service can do its work."""
        self.is_ready = True
        self.notifier.ready(self.describe())

    async def run(self) -> None:
        """Beat until cancelled; returns at once if nobody listens."""
        while self.notifier.is_heard:
            self.beat()
            await asyncio.sleep(self.interval_s)

    def beat(self) -> None:
        """Give one sign of life, or withhold it."""
        if not self.is_ready:
            self.notifier.extend(self.describe(), _START_EXTENSION_S)
        elif not self._is_stuck():
            self.notifier.pet(self.describe())

    def _is_stuck(self) -> bool:
        stuck_s, watchdog_s = self.stuck_for_s(), self.notifier.watchdog_s
        is_stuck = watchdog_s is not None and stuck_s > PATIENCE * watchdog_s
        if is_stuck and not self._was_stuck:
            logger.critical("nothing has moved for %.1f s: the watchdog is no longer petted", stuck_s)
        self._was_stuck = is_stuck
        return is_stuck
