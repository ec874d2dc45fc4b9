"""One process: it may be killed and started again, stopped and continued, and its clock is its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from kvrelay.simulator.faults.world import Step, World

MAX_CLOCK_ERROR: Final = 0.1
"""How much faster or slower a process' clock may run."""


class Process:
    """A `Clock`. Steps of an earlier life are not taken any more; those that are due while it is paused are
    taken when it goes on. `check` is called after each step."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.life = 0
        self.is_alive = False
        self.is_paused = False
        self.last_resumed_s = 0.0
        self.check: Step = _nothing
        self._parked: deque[tuple[bool, Step]] = deque()
        self._set_clock()

    def _set_clock(self) -> None:
        rng = self.world.rng
        self._clock_rate = 1.0 + rng.uniform(-MAX_CLOCK_ERROR, MAX_CLOCK_ERROR)
        self._clock_offset_s = rng.uniform(0.0, 1e4)
        self._started_s = self.world.now_s

    def now_s(self) -> float:
        """See `kvrelay.core.clock.Clock`; every life's begins somewhere else."""
        return self._clock_offset_s + (self.world.now_s - self._started_s) * self._clock_rate

    def start(self) -> None:
        """Begin a life."""
        assert not self.is_alive
        self.life += 1
        self.is_alive = True
        self._set_clock()

    def kill(self) -> None:
        """End at once, without a word."""
        self.is_alive = self.is_paused = False
        self.life += 1
        self._parked.clear()

    def pause(self) -> None:
        """Stand still, as by SIGSTOP."""
        self.is_paused = True

    def resume(self) -> None:
        """Go on: what has become due meanwhile comes first; timers before or after what has arrived."""
        self.is_paused = False
        self.last_resumed_s = self.world.now_s
        parked, self._parked = list(self._parked), deque()
        order = self.world.rng.randrange(3)
        if order:
            parked.sort(key=lambda item: item[0] is (order == 1))
        for is_timer, step in parked:
            self._plan(0.0, step, is_timer=is_timer)

    def after(self, delay_s: float, step: Step) -> None:
        """Have `step` taken when so much time has passed on its own clock."""
        self._plan(delay_s / self._clock_rate, step, is_timer=True)

    def deliver(self, step: Step) -> None:
        """Something has arrived: `step` is taken now, or when the process goes on. No-op if it is dead."""
        if self.is_alive:
            self._take(self.life, step, is_timer=False)

    def _plan(self, delay_s: float, step: Step, *, is_timer: bool) -> None:
        life = self.life
        self.world.after(delay_s, lambda: self._take(life, step, is_timer=is_timer))

    def _take(self, life: int, step: Step, *, is_timer: bool) -> None:
        if life != self.life:
            return
        if self.is_paused:
            self._parked.append((is_timer, step))
            return
        step()
        if life == self.life:
            self.check()


class Lane:
    """Posts from one thread of a process to another: a short while later, in order."""

    def __init__(self, process: Process, max_delay_s: float = 0.0005) -> None:
        self._process = process
        self._max_delay_s = max_delay_s
        self._last_s = 0.0

    def post(self, step: Step, not_before_s: float = 0.0) -> None:
        """`not_before_s`: on the process' clock."""
        process = self._process
        now_s = process.now_s()
        due_s = max(self._last_s, not_before_s, now_s) + process.world.rng.random() * self._max_delay_s
        self._last_s = due_s
        process.after(due_s - now_s, step)


class Timer:
    """At most one step is planned; a new one takes its place. Putting it off costs nothing."""

    def __init__(self, process: Process, step: Callable[[], None]) -> None:
        self._process = process
        self._step = step
        self._number = 0
        self._wakes_s: float | None = None
        self.due_s: float | None = None

    def set(self, delay_s: float) -> None:
        """Have the step taken then, in place of what was planned."""
        self.due_s = self._process.now_s() + delay_s
        if self._wakes_s is None or self.due_s < self._wakes_s:
            self._plan(delay_s)

    def set_sooner(self, delay_s: float) -> None:
        """As `set`, unless it is planned for that moment or before it."""
        if self.due_s is None or self._process.now_s() + delay_s < self.due_s - 1e-9:
            self.set(delay_s)

    def clear(self) -> None:
        """Plan nothing."""
        self.due_s = None

    def _plan(self, delay_s: float) -> None:
        self._number += 1
        number = self._number
        self._wakes_s = self._process.now_s() + delay_s
        self._process.after(delay_s, lambda: self._fire(number))

    def _fire(self, number: int) -> None:
        if number != self._number:
            return
        self._wakes_s = None
        if self.due_s is None:
            return
        left_s = self.due_s - self._process.now_s()
        if left_s > 1e-9:
            self._plan(left_s)
        else:
            self.due_s = None
            self._step()


def _nothing() -> None:
    return
