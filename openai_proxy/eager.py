"""Calls that seldom wait, made without a task of their own."""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from functools import partial
from typing import Any


def start_now(work: Awaitable[None]) -> Begun | None:
    """Run `work` here and now up to where it first waits; None: it did not wait, and is over.

    What is left of it is to be awaited. `work` must not ask for the current task before it waits.

    Raises whatever `work` raises.
    """
    steps = work.__await__()
    try:
        waits_for = next(steps)
    except StopIteration:
        return None
    return Begun(steps, waits_for)


class Begun:
    """The rest of a call that waits."""

    def __init__(self, steps: Generator[Any, Any, None], waits_for: Any) -> None:
        self._steps = steps
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        steps, waits_for = self._steps, self._waits_for
        while True:
            try:
                sent = yield waits_for
            except BaseException as error:
                go_on = partial(steps.throw, error)
            else:
                go_on = partial(steps.send, sent)
            try:
                waits_for = go_on()
            except StopIteration:
                return
