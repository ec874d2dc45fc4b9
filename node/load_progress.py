"""Progress of loading a model, one line for every tenth, and more time from the service manager."""

from __future__ import annotations

from typing import Final, TextIO

from kvrelay.node.sd_notify import Notifier

STALLED_LOAD_S: Final = 600.0
"""A load that has not moved for this long has failed, as far as a service manager is concerned."""


class LoadProgress:
    """Called by an engine's loader with the fraction done and what is being done."""

    def __init__(self, out: TextIO, notifier: Notifier) -> None:
        self._out = out
        self._notifier = notifier
        self._last_tenth = -1

    def __call__(self, fraction: float, text: str) -> None:
        """Print a line if another tenth is done."""
        tenth = int(min(1.0, max(0.0, fraction)) * 10 + 1e-9)
        if tenth > self._last_tenth:
            self._last_tenth = tenth
            self._notifier.extend(f"loading: {10 * tenth} % {text}", STALLED_LOAD_S)
            print(f"{10 * tenth:3d} % {text}".rstrip(), file=self._out, flush=True)
