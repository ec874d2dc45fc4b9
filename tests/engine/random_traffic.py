"""Random traffic on one engine: requests that come, are answered and are released in the middle."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from kvrelay.core.errors import Overloaded


def run_random_traffic(
    driver: Any,
    requests: Sequence[Any],
    expected: Sequence[list[int]],
    random: Random,
    *,
    eagerness: float = 0.6,
) -> None:
    """Each request gets its expected tokens, or the first of them if it is released; nothing stays held.

    `eagerness`: the chance, before each step, that one more request is submitted.
    """
    waiting, released = list(enumerate(requests)), set()
    while waiting or driver.engine.has_work():
        while waiting and random.random() < eagerness:
            index, request = waiting[0]
            try:
                driver.engine.submit(request, f"k{index}")
            except Overloaded:
                break
            waiting.pop(0)
        driver.step()
        if random.random() < 0.05:
            index = random.randrange(len(requests))
            released.add(f"k{index}")
            driver.engine.release(f"k{index}")
    for index, tokens in enumerate(expected):
        got = driver.tokens(f"k{index}")
        assert got == (tokens[: len(got)] if f"k{index}" in released else tokens)
    assert driver.failures == []
    assert driver.engine.load().num_held_blocks == 0
