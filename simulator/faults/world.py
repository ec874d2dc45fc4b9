"""The virtual clock, the one source of randomness, and what happens when."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from random import Random
from struct import pack
from typing import Final
from zlib import crc32

MAX_TRANSCRIPT_LINES: Final = 200_000

Step = Callable[[], None]


class Violation(AssertionError):
    """An invariant does not hold."""


class World:
    """Runs steps in order of time. Whatever is drawn at random is drawn from `rng`, so a seed gives the same
    run each time; `digest` tells two runs apart.

    `transcript` collects readable lines where it is asked for: it costs more than everything else.
    """

    def __init__(self, seed: int, *, keeps_transcript: bool = False) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.now_s = 0.0
        self.num_steps = 0
        self.digest = 0
        self.transcript: list[str] | None = [] if keeps_transcript else None
        self._todo: list[tuple[float, int, Step]] = []
        self._num_planned = 0

    def at(self, time_s: float, step: Step) -> None:
        """Have `step` taken then, behind others of the same time."""
        self._num_planned += 1
        heappush(self._todo, (max(time_s, self.now_s), self._num_planned, step))

    def after(self, delay_s: float, step: Step) -> None:
        """Have `step` taken so much later."""
        self.at(self.now_s + delay_s, step)

    def run(self, until_s: float, is_over: Callable[[], bool] | None = None) -> None:
        """Take all steps up to `until_s`, or until `is_over`, which is asked after each."""
        todo = self._todo
        while todo and todo[0][0] <= until_s:
            self.now_s, number, step = heappop(todo)
            self.num_steps += 1
            self.digest = crc32(pack("<dq", self.now_s, number), self.digest)
            step()
            if is_over is not None and is_over():
                return
        self.now_s = until_s

    @property
    def is_traced(self) -> bool:
        """Whether `say` keeps anything."""
        return self.transcript is not None

    def say(self, who: str, text: str) -> None:
        """A line of the transcript."""
        if self.transcript is not None and len(self.transcript) < MAX_TRANSCRIPT_LINES:
            self.transcript.append(f"{self.now_s:9.4f} {who:<8} {text}")

    def chance(self, probability: float) -> bool:
        """True that often."""
        return probability > 0.0 and self.rng.random() < probability
