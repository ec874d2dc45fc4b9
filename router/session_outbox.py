"""What waits to be written to one client stream: merged while the stream is being written, bounded.

While one message is on its way, everything new gathers into the next, so a slower client gets fewer,
larger messages, and each costs the router the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import chain

from kvrelay.core.client_types import CallAccepted, CallFinished, SessionUpdate
from kvrelay.core.errors import KVRelayError
from kvrelay.router.events import DeliverTokens


class SessionOutbox:
    """One writer takes; anyone on the loop puts. Holds at most `max_buffered_tokens`, and the answers to as
    many calls as its reader lets in (see `has_room_for_calls`)."""

    def __init__(self, max_buffered_tokens: int, max_buffered_answers: int) -> None:
        self._max_buffered_tokens = max_buffered_tokens
        self._max_buffered_answers = max_buffered_answers
        self._tokens: list[DeliverTokens] = []
        self._num_tokens = 0
        self._next = SessionUpdate()
        self._has_news = False
        self._is_closed = False
        self._waiter: asyncio.Future[None] | None = None
        self._taken = asyncio.Event()

    @property
    def num_buffered_tokens(self) -> int:
        return self._num_tokens

    def put_tokens(self, tokens: DeliverTokens) -> bool:
        """Queue tokens; their columns are shared, not changed. False: they did not fit."""
        num_tokens = self._num_tokens + len(tokens.token_ids)
        if num_tokens > self._max_buffered_tokens:
            return False
        self._tokens.append(tokens)
        self._num_tokens = num_tokens
        self._announce()
        return True

    def put_accepted(self, stream_id: int, accepted: CallAccepted) -> None:
        self._next.accepted.append((stream_id, accepted))
        self._announce()

    def put_finished(self, stream_id: int, finished: CallFinished) -> None:
        self._next.finished.append((stream_id, finished))
        self._announce()

    def put_failed(self, stream_id: int, error: KVRelayError) -> None:
        """The stream's end. A call that fails as soon as it came was never accepted."""
        accepted = self._next.accepted
        if accepted and accepted[-1][0] == stream_id:
            accepted.pop()
        self._next.failed.append((stream_id, error))
        self._announce()

    def fail_slow_streams(self, live_stream_ids: Iterable[int], error: KVRelayError) -> None:
        """Drop all tokens that wait; fail the live streams, and those whose last tokens were among them."""
        finished = [stream_id for stream_id, _ in self._next.finished]
        earlier = self._next
        self._take_tokens()
        self._next = SessionUpdate(accepted=earlier.accepted, failed=earlier.failed)
        self._next.failed += [(stream_id, error) for stream_id in (*finished, *live_stream_ids)]
        self._announce()

    def close(self) -> None:
        """Let the writer take what is left, then end."""
        self._is_closed = True
        self._wake()
        self._taken.set()

    async def take(self) -> SessionUpdate | None:
        """All that waits, once there is something; None after `close`."""
        while not self._has_news:
            if self._is_closed:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.take_now()

    @property
    def has_news(self) -> bool:
        """Whether anything waits."""
        return self._has_news

    def take_now(self) -> SessionUpdate:
        """All that waits, be it nothing.

        Tokens of a single delivery come in its own columns: rows that are delivered again are told by that.
        """
        update, self._next = self._next, SessionUpdate()
        _add_tokens(update, self._take_tokens())
        self._has_news = False
        self._taken.set()
        return update

    async def has_room_for_calls(self) -> None:
        """Returns when the client has been sent enough of the answers to its earlier calls."""
        while self._num_answers >= self._max_buffered_answers and not self._is_closed:
            self._taken.clear()
            await self._taken.wait()

    def _take_tokens(self) -> list[DeliverTokens]:
        tokens, self._tokens = self._tokens, []
        self._num_tokens = 0
        return tokens

    @property
    def _num_answers(self) -> int:
        return len(self._next.accepted) + len(self._next.finished) + len(self._next.failed)

    def _announce(self) -> None:
        self._has_news = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _add_tokens(update: SessionUpdate, deliveries: list[DeliverTokens]) -> None:
    if len(deliveries) == 1:
        tokens = deliveries[0]
        update.stream_ids, update.counts = tokens.stream_ids, tokens.counts
        update.token_ids, update.logprobs = tokens.token_ids, tokens.logprobs
    elif deliveries:
        update.stream_ids = list(chain.from_iterable(tokens.stream_ids for tokens in deliveries))
        update.counts = list(chain.from_iterable(tokens.counts for tokens in deliveries))
        update.token_ids = list(chain.from_iterable(tokens.token_ids for tokens in deliveries))
        if any(tokens.logprobs for tokens in deliveries):
            # One column for all: those without get None.
            columns = (tokens.logprobs or [None] * len(tokens.token_ids) for tokens in deliveries)
            update.logprobs = list(chain.from_iterable(columns))
