"""The core's wish to look at its queue again is met once, at the earliest time that it named."""

import asyncio
import math

from kvrelay.router.look_timer import LookTimer


async def test_the_earliest_wish_is_met_and_later_ones_count_again() -> None:
    looks: list[int] = []
    looked = asyncio.Event()

    def look() -> None:
        looks.append(len(looks))
        looked.set()

    timer = LookTimer(look)
    timer.ask(math.inf, 0.0)
    timer.ask(3600.0, 0.0)
    timer.ask(0.01, 0.0)
    timer.ask(7200.0, 0.0)
    await looked.wait()
    assert looks == [0]
    looked.clear()
    timer.ask(5.0, 5.0)
    await looked.wait()
    assert looks == [0, 1]
