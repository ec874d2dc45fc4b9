"""What arriving handoffs do to the answers that a decode node is in the middle of.

In each phase the same number of long answers starts anew, from prompts of 512 tokens, so that context grows
alike in all phases. Once all of them are decoding, a window begins: nothing else happens in it ("alone"), or
further requests arrive by a Poisson process, with long prompts and 8 output tokens, so that the KV of a
whole prompt comes in for each but the batch hardly grows. Compared is the ITL of the long answers within the
window. The phase without arrivals comes first and last: how far the two differ says how much the rest means.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.load import Cell, Request, Target, draw_prompt, prepare, run_prepared
from benchmarks.percentiles import percentile

STREAM_PROMPT, STREAM_OUTPUT = 512, 16_000
SETTLED_TOKENS = 16
START_TIMEOUT_S = 30.0
ARRIVING_OUTPUT = 8


@dataclass(frozen=True)
class Disturbance:
    """`num_input` tokens of each arriving prompt; `seconds` of each phase."""

    num_input: int
    num_streams: int
    seconds: float
    vocab_size: int


async def disturbance_phases(
    target: Target, work: Disturbance, rates: Sequence[float]
) -> AsyncIterator[tuple[float, dict[str, float]]]:
    """(arrivals a second, figures) of each phase as it ends. Ends the program if a request fails."""
    alone_p99_ms: float | None = None
    for number, rate in enumerate((0.0, *rates, 0.0)):
        row = await _measure_phase(target, work, rate, f"disturb {number}")
        alone_p99_ms = alone_p99_ms or row["itl p99"]
        yield rate, {**row, "p99 growth %": (row["itl p99"] / alone_p99_ms - 1) * 100}


async def _measure_phase(target: Target, work: Disturbance, rate: float, seed: str) -> dict[str, float]:
    streams = [
        Request(draw_prompt(f"{seed} {index}", STREAM_PROMPT, work.vocab_size), STREAM_OUTPUT)
        for index in range(work.num_streams)
    ]
    arriving: list[Request] = []
    if rate:
        arriving = Cell(work.num_input, rate, ARRIVING_OUTPUT, work.seconds, seed).requests(work.vocab_size)
    prepare(target, [*streams, *arriving])
    tasks = [asyncio.create_task(target.ask(stream)) for stream in streams]
    try:
        await _until_all_decode(streams, tasks)
        begin_s = time.perf_counter()
        await run_prepared(target, arriving)
        await asyncio.sleep(max(0.0, begin_s + work.seconds - time.perf_counter()))
        _exit_if_failed(tasks, arriving)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return _summary(streams, arriving, begin_s, begin_s + work.seconds)


async def _until_all_decode(streams: Sequence[Request], tasks: Sequence[asyncio.Task[None]]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(START_TIMEOUT_S):
            while any(len(stream.arrivals_s) < SETTLED_TOKENS for stream in streams):
                _exit_if_failed(tasks, [])
                await asyncio.sleep(0.01)
            return
    sys.exit(f"the long answers did not all begin within {START_TIMEOUT_S:g} s")


def _exit_if_failed(tasks: Sequence[asyncio.Task[None]], arriving: Sequence[Request]) -> None:
    """A long answer must not have ended in any way: it would no longer be in the batch."""
    for task in tasks:
        if task.done():
            sys.exit(f"a long answer ended early: {task.exception() or 'all its tokens came'}")
    failed = [request.error for request in arriving if request.error]
    if failed:
        sys.exit(f"{len(failed)} of {len(arriving)} arriving requests failed: {failed[0]}")


def _summary(
    streams: Sequence[Request], arriving: Sequence[Request], begin_s: float, end_s: float
) -> dict[str, float]:
    """ITL in ms of gaps that lie within the window; `rows added`: decode tokens of the arriving requests for
    each step of the long answers."""
    gaps: list[float] = []
    for stream in streams:
        inside = [at_s for at_s in stream.arrivals_s if begin_s <= at_s <= end_s]
        gaps += [(after - before) * 1e3 for before, after in pairwise(inside)]
    steps = len(gaps) / len(streams)
    added = sum(begin_s <= at_s <= end_s for request in arriving for at_s in request.arrivals_s[1:])
    return {
        "arrived": len(arriving),
        "itl p50": percentile(gaps, 50),
        "itl p99": percentile(gaps, 99),
        "itl max": max(gaps),
        "rows added": added / steps,
    }
