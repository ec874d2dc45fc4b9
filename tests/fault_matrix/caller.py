"""The request that a cell of the matrix is about, as its client sees it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvrelay.client import AsyncClient, GenerationResult
from kvrelay.core.errors import KVRelayError, RequestCancelled
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.interface import SequenceKey
from kvrelay.engine.sim.engine import SimEngine
from kvrelay.engine.sim.timing import INSTANT


class UnbrokenRun:
    """What a prompt's answer is: the `sim` engine, alone and undisturbed. `tokenizer`: see `EngineConfig`."""

    def __init__(self, tokenizer: str = "") -> None:
        config = EngineConfig(
            "sim",
            engine="sim",
            num_blocks=1024,
            max_num_batched_tokens=8192,
            tokenizer=tokenizer,
            sim_timing=INSTANT,
        )
        self._engine = SimEngine(config)

    def answer(self, prompt: Sequence[int], sampling: SamplingParams) -> tuple[int, ...]:
        self._engine.submit(TokenRequest(tuple(prompt), len(prompt), sampling), SequenceKey("it"))
        tokens: list[int] = []
        while self._engine.has_work():
            tokens += [output.token_id for output in self._engine.step().outputs]
        return tuple(tokens)


@dataclass
class Caller:
    """Asks, and notes when each of the `pieces` of the answer came. Times are of the monotonic clock.

    `may_break`: the fault ends what the caller talks to, so a broken connection is a fair answer.
    """

    client: AsyncClient
    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    expected: tuple[object, ...]
    pieces: list[object] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    fault: str = ""
    """What was wrong with the order of what came."""
    error: Exception | None = None
    result: GenerationResult | None = None
    may_break: bool = False
    has_left: bool = False
    ended_s: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._read())

    async def leave(self) -> None:
        """Be gone, without a word to anyone."""
        self.has_left = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self) -> None:
        stream = self.client.generate(
            self.prompt, sampling=self.sampling, request_id=self.request_id, decode_text=False
        )
        try:
            async for chunk in stream:
                if chunk.index != len(self.pieces):
                    self.fault = self.fault or f"token {chunk.index} came as number {len(self.pieces)}"
                self.pieces += chunk.token_ids
                self.arrivals_s += [time.monotonic()] * len(chunk.token_ids)
            self.result = stream.result
        except KVRelayError as error:
            self.error = error
        finally:
            self.ended_s = time.monotonic()
            self.ended.set()

    def longest_pause_s(self, since_s: float) -> float | None:
        """The longest time without a token, from then on to the request's end; None: it was over by then."""
        if self.ended.is_set() and self.ended_s <= since_s:
            return None
        times = [since_s, *(arrival_s for arrival_s in self.arrivals_s if arrival_s > since_s)]
        if self.error is not None:
            times.append(self.ended_s)
        pauses = [after - before for before, after in itertools.pairwise(times)]
        return max(pauses, default=None)

    @property
    def is_beginning(self) -> bool:
        """Whether the unbroken answer begins with what came."""
        return self.expected[: len(self.pieces)] == tuple(self.pieces)

    @property
    def is_whole(self) -> bool:
        """Whether what came is the unbroken answer."""
        return self.expected == tuple(self.pieces)

    @property
    def progress(self) -> str:
        """How much came."""
        return f"{len(self.pieces)} of {len(self.expected)} tokens"

    @property
    def error_name(self) -> str:
        """Of an error that came; else empty."""
        if self.error is None:
            return ""
        return self.error.code if isinstance(self.error, KVRelayError) else type(self.error).__name__

    def complaint(self) -> str:
        """What a client may complain of; empty: nothing."""
        if self.has_left or isinstance(self.error, RequestCancelled) or (self.error and self.may_break):
            return self.fault or ("" if self.is_beginning else "wrong tokens")
        if self.error is not None:
            return f"{self.error_name}: {self.error}"
        if not self.ended.is_set():
            return f"hangs after {self.progress}"
        return self.fault or ("" if self.is_whole else "wrong tokens")
