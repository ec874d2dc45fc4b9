"""Progress of loading a model, one line for every tenth."""

from __future__ import annotations

from typing import TextIO


class LoadProgress:
    """Called by an engine's loader with the fraction done and what is being done."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._last_tenth = -1

    def __call__(self, fraction: float, text: str) -> None:
        """Print a line if another tenth is done."""
        tenth = int(min(1.0, max(0.0, fraction)) * 10 + 1e-9)
        if tenth > self._last_tenth:
            self._last_tenth = tenth
            print(f"{10 * tenth:3d} % {text}".rstrip(), file=self._out, flush=True)
