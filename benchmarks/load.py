"""Requests at times and with prompts that a seed decides, alike for every system, and what came of them.

All times are `time.perf_counter()` of this process. TTFT counts from the moment at which a request was due.
Nothing is decoded or drawn while requests are under way that can be done before or after.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, Protocol

from benchmarks.percentiles import percentile

TTFT_LIMIT_MS, ITL_LIMIT_MS = 500.0, 25.0
REQUEST_TIMEOUT_S = 60.0
FIRST_TOKEN_ID = 10


@dataclass(eq=False)
class Request:
    """One request and when its tokens came, in seconds. `payload` is its target's own."""

    prompt: list[int]
    num_output: int
    due_s: float = 0.0
    sent_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)
    error: str = ""
    notes: dict[str, float] = field(default_factory=dict)
    payload: Any = None

    def note(self, num_tokens: int) -> None:
        """So many tokens have come just now."""
        self.arrivals_s += [time.perf_counter()] * num_tokens

    @property
    def ttft_ms(self) -> float:
        return (self.arrivals_s[0] - self.due_s) * 1e3

    @property
    def gaps_ms(self) -> list[float]:
        return [(after - before) * 1e3 for before, after in pairwise(self.arrivals_s)]

    @property
    def is_good(self) -> bool:
        """Within both limits, by its own gaps."""
        return self._is_within(self.ttft_ms, self.gaps_ms)

    @property
    def is_good_later(self) -> bool:
        """The same without the gap from the first to the second token, in which a handover lies."""
        return self._is_within(self.ttft_ms, self.gaps_ms[1:])

    @property
    def is_good_of_decode(self) -> bool:
        """The same for who is shown the decode server's stream alone, where that has a first token too."""
        first_ms = self.notes.get("decode_first", self.ttft_ms)
        second_ms = (self.arrivals_s[1] - self.due_s) * 1e3 if len(self.arrivals_s) > 1 else first_ms
        return self._is_within(first_ms, [second_ms - first_ms, *self.gaps_ms[1:]])

    def _is_within(self, first_ms: float, gaps_ms: Sequence[float]) -> bool:
        if self.error or first_ms > TTFT_LIMIT_MS:
            return False
        return not gaps_ms or percentile(gaps_ms, 99) <= ITL_LIMIT_MS


class Target(Protocol):
    """A system that can be asked."""

    def prepare(self, request: Request) -> None:
        """What can be done before the request is due."""
        ...

    async def ask(self, request: Request) -> None:
        """Ask, and note when tokens come. Raises what went wrong."""
        ...

    def read(self, request: Request) -> None:
        """What can be left until no request is under way. Raises what went wrong."""
        ...


@dataclass(frozen=True)
class Cell:
    """Poisson arrivals at `rate` a second for `seconds`."""

    num_input: int
    rate: float
    num_output: int
    seconds: float
    seed: str = "load"

    @property
    def name(self) -> str:
        return f"{self.num_input}:{self.rate:g}"

    def requests(self, vocab_size: int) -> list[Request]:
        """`due_s` counts from the cell's beginning; the first is due at once."""
        chance = random.Random(f"{self.seed} {self.name}")
        due_s = 0.0
        found: list[Request] = []
        while due_s < self.seconds:
            prompt = draw_prompt(f"{self.seed} {self.name} {len(found)}", self.num_input, vocab_size)
            found.append(Request(prompt, self.num_output, due_s))
            due_s += chance.expovariate(self.rate)
        return found


def draw_prompt(seed: str, num_tokens: int, vocab_size: int) -> list[int]:
    """Random tokens: prompts of two seeds share no prefix that a cache could use."""
    return random.Random(seed).choices(range(FIRST_TOKEN_ID, vocab_size), k=num_tokens)


async def run_cell(target: Target, cell: Cell, vocab_size: int) -> list[Request]:
    """All of the cell's requests, once the last has been answered or has failed."""
    requests = cell.requests(vocab_size)
    prepare(target, requests)
    await run_prepared(target, requests)
    return requests


async def run_prepared(target: Target, requests: Sequence[Request]) -> None:
    """Ask each when it is due, counted from now, and wait for all."""
    tasks = []
    begin_s = time.perf_counter()
    for request in requests:
        request.due_s += begin_s
        await asyncio.sleep(max(0.0, request.due_s - time.perf_counter()))
        tasks.append(asyncio.create_task(_ask(target, request)))
    await asyncio.gather(*tasks)
    _read(target, requests)


async def run_idle(
    target: Target, num_input: int, vocab_size: int, *, repeats: int = 6, num_output: int = 32
) -> list[Request]:
    """Requests one after the other, until the second that fails; the first is there to warm up and is not
    given back, unless it failed."""
    requests = [
        Request(draw_prompt(f"idle {num_input} {index}", num_input, vocab_size), num_output)
        for index in range(repeats + 1)
    ]
    prepare(target, requests)
    asked: list[Request] = []
    for request in requests:
        if sum(bool(earlier.error) for earlier in asked) == 2:
            break
        request.due_s = time.perf_counter()
        await _ask(target, request)
        asked.append(request)
    _read(target, asked)
    return [request for index, request in enumerate(asked) if index or request.error]


def prepare(target: Target, requests: Sequence[Request]) -> None:
    """What would disturb the measurement if it were done when a request is due."""
    for request in requests:
        target.prepare(request)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would hold up this process for milliseconds while tokens come


async def _ask(target: Target, request: Request) -> None:
    """Whatever goes wrong is written down, so that it is counted."""
    request.sent_s = time.perf_counter()
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            await target.ask(request)
    except Exception as error:
        request.error = f"{type(error).__name__}: {error}"[:500]


def _read(target: Target, requests: Sequence[Request]) -> None:
    """Also fails those that got another number of tokens than they asked for."""
    for request in requests:
        try:
            target.read(request)
        except Exception as error:
            request.error = request.error or f"{type(error).__name__}: {error}"[:500]
        request.payload = None
        if not request.error and len(request.arrivals_s) != request.num_output:
            request.error = f"{len(request.arrivals_s)} tokens came of {request.num_output}"
    gc.enable()
    gc.unfreeze()


def load_summary(requests: Sequence[Request]) -> dict[str, float]:
    """Counts, and times in ms of the requests that did not fail; goodput is a share of all.

    `goodput` counts the gap from the first to the second token among the inter-token latencies, `goodput
    later` does not, and `goodput of decode` looks at what a decode server streams, from its own first token.
    """
    done = [request for request in requests if not request.error]
    found: dict[str, float] = {"requests": len(requests), "failed": len(requests) - len(done)}
    if not done:
        return found
    series = {
        "ttft": [request.ttft_ms for request in done],
        "itl": [gap for request in done for gap in request.gaps_ms],
        "second": [request.gaps_ms[0] for request in done],
    }
    for name, values in series.items():
        found |= {f"{name} p50": percentile(values, 50), f"{name} p99": percentile(values, 99)}
    goods = {
        "goodput": [request.is_good for request in done],
        "goodput later": [request.is_good_later for request in done],
        "goodput of decode": [request.is_good_of_decode for request in done],
    }
    return {**found, **{name: sum(values) / len(requests) for name, values in goods.items()}}


def idle_summary(requests: Sequence[Request]) -> dict[str, float]:
    """Medians in ms. `second`: second token minus first; `handoff`: that less a decode step, which is the
    median of a request's later gaps."""
    done = [request for request in requests if not request.error]
    found: dict[str, float] = {"requests": len(requests), "failed": len(requests) - len(done)}
    if not done:
        return found
    rows = [(request.ttft_ms, request.gaps_ms[0], median(request.gaps_ms[2:])) for request in done]
    ttft, second, step = (median(column) for column in zip(*rows, strict=True))
    handoffs = [row[1] - row[2] for row in rows]
    return {
        **found,
        "ttft": ttft,
        "second": second,
        "second max": max(row[1] for row in rows),
        "step": step,
        "handoff": second - step,
        "handoff max": max(handoffs),
    }


def request_row(request: Request, begin_s: float) -> dict[str, Any]:
    """For looking at afterwards: ms, tokens counted from when the request was due."""
    return {
        "due": round((request.due_s - begin_s) * 1e3, 2),
        "sent_late": round((request.sent_s - request.due_s) * 1e3, 3),
        "tokens": [round((at_s - request.due_s) * 1e3, 2) for at_s in request.arrivals_s],
        **{name: round(value, 2) for name, value in request.notes.items()},
        **({"error": request.error} if request.error else {}),
    }
