"""One request on its way: tokenized, submitted, repeated, continued through another router, ended.

Everything happens in the task of who reads; nothing runs behind its back.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Final

from kvrelay.client.config import ClientConfig
from kvrelay.client.generation_ask import GenerationAsk, PreparedCall
from kvrelay.client.in_flight import InFlight
from kvrelay.client.mailbox import AttemptEnd, AttemptFailed, Delivery, Mailbox
from kvrelay.client.output_text import OutputText
from kvrelay.client.request_progress import RequestProgress
from kvrelay.client.results import GenerationChunk, GenerationResult
from kvrelay.client.router_set import RouterSet
from kvrelay.client.session import Session
from kvrelay.core.client_types import CallFinished
from kvrelay.core.errors import (
    DeadlineExceeded,
    DuplicateRequest,
    KVRelayError,
    RequestCancelled,
    RouterUnavailable,
)
from kvrelay.core.request import FinishReason
from kvrelay.core.request_report import RequestReport


@dataclass(frozen=True, slots=True)
class GenerationParts:
    """What a generation needs of its client. `now_s` is a monotonic clock; `cancel_leftover` has the router
    at an address let go of a request by its id."""

    routers: RouterSet
    config: ClientConfig
    rng: Random
    in_flight: InFlight
    now_s: Callable[[], float]
    prepare: Callable[[GenerationAsk], Awaitable[PreparedCall]]
    cancel_leftover: Callable[[str, str], Awaitable[None]]


TakeChunk = Callable[[GenerationChunk], Awaitable[None] | None]
"""Takes a chunk; returns what to wait for before the next one may come, None: nothing."""


@dataclass(slots=True)
class _Attempt:
    session: Session
    stream_id: int


_NOTHING: Final = GenerationChunk("", (), (), -1)


class Generation:
    """The request from its first `next_chunk` to its end, or to `leave`. Read by one task at a time."""

    def __init__(self, ask: GenerationAsk, parts: GenerationParts) -> None:
        self.ask = ask
        self.loop: asyncio.AbstractEventLoop | None = None
        self.is_over = False
        self.result: GenerationResult | None = None
        self.progress: RequestProgress | None = None
        self._parts = parts
        self._mailbox = Mailbox(parts.config.max_buffered_tokens)
        self._output_text = OutputText(None)
        self._attempt: _Attempt | None = None
        self._failure: AttemptFailed | None = None
        self._router = ""
        self._is_router_well = False
        self._deadline_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._scope: asyncio.Timeout | None = None
        self._is_cancelled = False
        self._pending: Awaitable[None] | None = None
        self._take_error: Exception | None = None

    async def next_chunk(self) -> GenerationChunk | None:
        """The next part (an empty one: `each` has news), or None after the last. After an error: `leave`.

        Raises:
            KVRelayError: the request can't be served, and repeating it does not help.
        """
        if self.loop is None:
            self._enter()
        while not self.is_over:
            progress = self.progress
            if progress is not None and self._output_text.stop_text is not None:
                await self._end_satisfied(progress)
                return None
            if self._attempt is None or progress is None:
                progress = await self._begin_attempt()
            chunk = self._absorb(progress, await self._mailbox.take())
            if chunk is not None:
                return chunk
            if self._pending is not None or self._take_error is not None:
                return _NOTHING
        return None

    async def each(self, take: TakeChunk) -> None:
        """Give `take` every part. Those that one token brings while nothing else is waited for are given
        where they arrive, without waking the task that calls this.

        Raises:
            KVRelayError: as `next_chunk`; or whatever `take` raises.
        """
        self._mailbox.listener = partial(self._absorb_now, take)
        try:
            chunk: GenerationChunk | None = _NOTHING
            while chunk is not None:
                chunk = await self.next_chunk()
                if self._take_error is not None:
                    raise self._take_error
                pending, self._pending = self._pending, None
                if pending is not None:  # what was taken where it came goes before what came after it
                    await pending
                if chunk is not None and chunk is not _NOTHING and (pending := take(chunk)) is not None:
                    await pending
        finally:
            self._mailbox.listener = None

    def cancel(self) -> None:
        """The caller wants no more: a reader that waits gets `RequestCancelled`, then `leave`s."""
        self._is_cancelled = True
        if self._scope is not None and self.loop is not None:
            with suppress(RuntimeError):  # it is expiring already
                self._scope.reschedule(self.loop.time())
        elif self._mailbox.has_reader:
            self._mailbox.put_end(AttemptFailed(self._out_of_time(), is_final=True))
        else:
            self.leave()

    def leave(self) -> None:
        """Nothing more is wanted: cancel at the router what is under way."""
        if self.is_over:
            return
        self.is_over = True
        self._drop_attempt()
        if self._timer is not None:
            self._timer.cancel()
        if self.loop is not None:
            self._parts.in_flight.leave()

    def _enter(self) -> None:
        self._parts.in_flight.enter()
        self.loop = asyncio.get_running_loop()
        if self.ask.timeout_s is not None:
            self._deadline_s = self.loop.time() + self.ask.timeout_s
            end = AttemptFailed(self._out_of_time(), is_final=True)
            self._timer = self.loop.call_at(self._deadline_s, self._mailbox.put_end, end)

    def _out_of_time(self) -> KVRelayError:
        if self._is_cancelled:
            return RequestCancelled("the request was cancelled by its caller")
        return DeadlineExceeded(f"the request's timeout of {self.ask.timeout_s} s has passed")

    # ---- attempts -------------------------------------------------------------------------------

    async def _begin_attempt(self) -> RequestProgress:
        """Get the request, or its continuation, to a router."""
        assert self._scope is None, "a stream has one reader"
        try:
            async with asyncio.timeout_at(self._deadline_s) as self._scope:
                progress = self.progress or await self._prepare()
                while self._attempt is None:
                    if self._failure is not None:
                        await self._recover(progress, self._failure)
                    await self._submit(progress)
                return progress
        except TimeoutError:
            raise self._out_of_time() from None
        finally:
            self._scope = None

    async def _prepare(self) -> RequestProgress:
        started_s = self._parts.now_s()
        prepared = await self._parts.prepare(self.ask)
        self._output_text = prepared.output_text
        self.progress = RequestProgress(prepared.call, started_s)
        return self.progress

    async def _submit(self, progress: RequestProgress) -> None:
        """Start an attempt, or note that no router could be reached."""
        try:
            link = await self._parts.routers.connect(last=self._router)
        except RouterUnavailable as error:
            self._failure = AttemptFailed(error)
            return
        self._router = link.address
        session = link.session()
        stream_id = session.start(progress.next_call(self._parts.now_s()), self._mailbox)
        self._attempt = _Attempt(session, stream_id)
        self._is_router_well = False

    async def _recover(self, progress: RequestProgress, failure: AttemptFailed) -> None:
        """Wait until the request may be repeated, or raise what it failed of."""
        self._failure = None
        if failure.is_final:
            raise failure.error
        if failure.lost_router:
            self._parts.routers.mark_failed(self._router)
        pause_s = progress.pause_before_retry_s(
            failure.error,
            self._parts.config,
            self._parts.rng,
            self._parts.now_s(),
            may_switch=failure.lost_router and len(self._parts.routers.addresses) > 1,
        )
        if isinstance(failure.error, DuplicateRequest):
            await self._parts.cancel_leftover(self._router, progress.call.request_id)
        await asyncio.sleep(pause_s)

    # ---- answers --------------------------------------------------------------------------------

    def _absorb(self, progress: RequestProgress, delivery: Delivery) -> GenerationChunk | None:
        token_ids, logprobs, arrivals_s, end = delivery
        index = len(progress.token_ids)
        text, num_taken = self._output_text.push(token_ids)
        is_satisfied = self._output_text.stop_text is not None
        if is_satisfied:
            token_ids, logprobs = token_ids[:num_taken], logprobs[:num_taken]
            arrivals_s = arrivals_s[:num_taken]
        if token_ids:
            progress.take(token_ids, logprobs, arrivals_s)
            if not self._is_router_well:
                self._is_router_well = True
                self._parts.routers.mark_well(self._router)
        if isinstance(end, CallFinished) and not is_satisfied:
            if fault := progress.check_complete(end):
                end = AttemptFailed(fault, lost_router=True)
            else:
                text += self._output_text.flush()
        if end is not None:
            self._end_attempt(progress, end)
        elif is_satisfied and self._attempt is not None:
            self._attempt.session.finish(self._attempt.stream_id)
        if not token_ids and not text:
            return None
        return GenerationChunk(text, tuple(token_ids), tuple(progress.logprobs[index:]), index)

    async def _end_satisfied(self, progress: RequestProgress) -> None:
        """The text met its stop string: wait for the router's report, but never fail for want of it."""
        end: AttemptEnd | None = self._failure
        with suppress(TimeoutError):
            async with asyncio.timeout(self._parts.config.call_timeout_s):
                while end is None:
                    end = (await self._mailbox.take()).end
        if self._is_cancelled:
            raise self._out_of_time()
        if not isinstance(end, CallFinished):
            end = CallFinished(FinishReason.STOP, self._own_report(progress))
        self._end_attempt(progress, end)

    def _own_report(self, progress: RequestProgress) -> RequestReport:
        """What this client knows itself."""
        arrivals_s, started_s = progress.arrivals_s, progress.started_s
        return RequestReport(
            prefill_node="",
            decode_node="",
            num_attempts=progress.num_attempts,
            num_prompt_tokens=progress.call.request.num_prompt_tokens,
            num_output_tokens=len(progress.token_ids),
            num_cached_tokens=0,
            queue_s=0.0,
            ttft_s=arrivals_s[0] - started_s,
            total_s=self._parts.now_s() - started_s,
            kv_bytes=0,
            kv_messages=0,
            kv_seconds=0.0,
            kv_transport="",
        )

    def _absorb_now(self, take: TakeChunk, token_id: int, now_s: float) -> None:
        """Runs in the session's reader, which must never fail for one request's sake."""
        assert self.progress is not None
        try:
            chunk = self._absorb(self.progress, Delivery([token_id], [], [now_s], None))
            self._pending = take(chunk) if chunk is not None else None
        except Exception as error:  # raised where `each` was called
            self._take_error = error
        if (
            self._pending is not None
            or self._take_error is not None
            or self._output_text.stop_text is not None
        ):
            self._mailbox.wake()

    def _end_attempt(self, progress: RequestProgress, end: AttemptEnd) -> None:
        self._drop_attempt()
        if isinstance(end, AttemptFailed):
            self._failure = end
        else:
            self.leave()
            self.result = self._make_result(progress, end)

    def _drop_attempt(self) -> None:
        if self._attempt is not None:
            self._attempt.session.cancel(self._attempt.stream_id)
            self._attempt = None

    def _make_result(self, progress: RequestProgress, finished: CallFinished) -> GenerationResult:
        ended_s, arrivals_s = self._parts.now_s(), progress.arrivals_s
        stop_text = self._output_text.stop_text
        return GenerationResult(
            request_id=self.ask.request_id,
            text=self._output_text.whole,
            token_ids=tuple(progress.token_ids),
            finish_reason=FinishReason.STOP if stop_text is not None else finished.finish_reason,
            report=finished.report,
            logprobs=tuple(progress.logprobs),
            ttft_s=arrivals_s[0] - progress.started_s,
            itl_s=tuple(after - before for before, after in itertools.pairwise(arrivals_s)),
            total_s=ended_s - progress.started_s,
            num_retries=progress.num_retries,
            num_continuations=progress.num_continuations,
            router=self._router,
            stop_text=stop_text,
        )
