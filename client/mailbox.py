"""Where a session leaves what came for one request until its reader takes it. Bounded, one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvrelay.core.client_types import CallFinished
from kvrelay.core.errors import KVRelayError
from kvrelay.core.request import TokenLogprobs


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """An attempt's end. `is_final`: this client ended it, so it must not be repeated; `lost_router`: its
    router is gone, rather than having refused it."""

    error: KVRelayError
    is_final: bool = False
    lost_router: bool = False


AttemptEnd = CallFinished | AttemptFailed


class Delivery(NamedTuple):
    """All that had come; `arrivals_s` has one entry per token."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    arrivals_s: list[float]
    end: AttemptEnd | None


class Mailbox:
    """One reader, one session at a time."""

    __slots__ = ("_arrivals_s", "_end", "_logprobs", "_max_tokens", "_token_ids", "_waiter", "listener")

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs | None] = []
        self._arrivals_s: list[float] = []
        self._end: AttemptEnd | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.listener: Callable[[int, float], object] | None = None
        """Gets `put_token`'s tokens in place of a reader that waits, which sleeps on."""

    @property
    def has_reader(self) -> bool:
        """Whether someone waits for something to come."""
        return self._waiter is not None

    def put_tokens(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], now_s: float
    ) -> bool:
        """Add tokens; False: there is no room, and nothing was added."""
        if len(self._token_ids) + len(token_ids) > self._max_tokens:
            return False
        if logprobs or self._logprobs:
            self._logprobs += [None] * (len(self._token_ids) - len(self._logprobs))
            self._logprobs += logprobs or [None] * len(token_ids)
        self._token_ids += token_ids
        self._arrivals_s += [now_s] * len(token_ids)
        self.wake()
        return True

    def put_token(self, token_id: int, now_s: float) -> bool:
        """`put_tokens` of one without logprobs: what steady decode brings, so it does the least."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            if self.listener is not None:
                self.listener(token_id, now_s)
                return True
            waiter.set_result(None)
        if self._logprobs or len(self._token_ids) >= self._max_tokens:
            return self.put_tokens((token_id,), (), now_s)
        self._token_ids.append(token_id)
        self._arrivals_s.append(now_s)
        return True

    def put_end(self, end: AttemptEnd) -> None:
        """The attempt is over; the first end counts."""
        if self._end is None:
            self._end = end
            self.wake()

    async def take(self) -> Delivery:
        """Everything that came since; waits until there is something, or `wake`. An end is handed out
        once."""
        if not self._token_ids and self._end is None:
            assert self._waiter is None, "a stream has one reader"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        delivery = Delivery(self._token_ids, self._logprobs, self._arrivals_s, self._end)
        self._token_ids, self._logprobs, self._arrivals_s, self._end = [], [], [], None
        return delivery

    def wake(self) -> None:
        """Have a reader that waits look, whatever there is."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
