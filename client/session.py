"""One `Session` stream with one router, shared by all of a client's requests there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Final

import grpc

from kvrelay.client.mailbox import AttemptFailed, Mailbox
from kvrelay.codec.client_api import SessionUpdateDecoder, encode_session_ask
from kvrelay.codec.errors import from_rpc_error
from kvrelay.core.client_types import MAX_STREAM_ID, GenerateCall, SessionAsk, SessionUpdate
from kvrelay.core.errors import InvalidRequest, Overloaded, RequestCancelled, RouterUnavailable

if TYPE_CHECKING:
    from kvrelay.v1.router_pb2 import SessionRequest, SessionResponse

    SessionCall = grpc.aio.StreamStreamCall[SessionRequest, SessionResponse]

_MAX_CALLS_PER_ASK: Final = 256
_MAX_BYTES_PER_ASK: Final = 2_500_000
"""Of requests, which weigh some hundred bytes more: keeps a message under gRPC servers' usual 4 MiB."""


class Session:
    """Sends calls and cancellations in batches (what gathers while one is written goes into the next), and
    hands what comes back to each call's mailbox. Bounded by the calls in flight.

    Must be built, used and closed on one event loop.
    """

    def __init__(self, call: SessionCall, address: str, now_s: Callable[[], float]) -> None:
        self._call = call
        self._address = address
        self._now_s = now_s
        self._mailboxes: dict[int, Mailbox] = {}
        self._calls: dict[int, GenerateCall] = {}
        self._cancels: list[int] = []
        self._finishes: list[int] = []
        self._next_stream_id = 1
        self._news = asyncio.Event()
        self._is_closed = False
        self._reader = asyncio.create_task(self._read(), name=f"kvrelay session reader {address}")
        self._writer = asyncio.create_task(self._write(), name=f"kvrelay session writer {address}")

    @property
    def takes_calls(self) -> bool:
        """False once the stream has ended, or all stream ids are used up."""
        return not self._is_closed and self._next_stream_id <= MAX_STREAM_ID

    def start(self, call: GenerateCall, mailbox: Mailbox) -> int:
        """Send a call; all it leads to goes to `mailbox`. Returns its stream id.

        Only while `takes_calls`.
        """
        assert self.takes_calls
        stream_id = self._next_stream_id
        self._next_stream_id += 1
        self._mailboxes[stream_id] = mailbox
        self._calls[stream_id] = call
        self._news.set()
        return stream_id

    def cancel(self, stream_id: int) -> None:
        """Tell the router to stop; nothing more comes for that call. No effect on one that has ended."""
        if self._mailboxes.pop(stream_id, None) is None:
            return
        if self._calls.pop(stream_id, None) is None:
            self._cancels.append(stream_id)
            self._news.set()

    def finish(self, stream_id: int) -> None:
        """Tell the router that the caller has all it wants; the call's end still comes. No effect on one
        that has ended."""
        if stream_id in self._mailboxes:
            self._finishes.append(stream_id)
            self._news.set()

    async def close(self) -> None:
        """End the stream, which cancels its calls at the router. Their readers get `RequestCancelled`."""
        self._end(AttemptFailed(RequestCancelled("the client was closed"), is_final=True))
        for task in (self._reader, self._writer):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    # ---- out ------------------------------------------------------------------------------------

    async def _write(self) -> None:
        # That the stream broke is what the reader reports, with the reason.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while not self._is_closed:
                await self._news.wait()
                self._news.clear()
                while ask := self._next_ask():
                    await self._call.write(encode_session_ask(ask))

    def _next_ask(self) -> SessionAsk | None:
        if not self._calls and not self._cancels and not self._finishes:
            return None
        taken: list[tuple[int, GenerateCall]] = []
        num_bytes = 0
        for stream_id, call in islice(self._calls.items(), _MAX_CALLS_PER_ASK):
            num_bytes += call.request.max_message_bytes
            if taken and num_bytes > _MAX_BYTES_PER_ASK:
                break
            taken.append((stream_id, call))
        for stream_id, _ in taken:
            del self._calls[stream_id]
        cancels, self._cancels = tuple(self._cancels), []
        finishes, self._finishes = tuple(self._finishes), []
        return SessionAsk(tuple(taken), cancels, finishes)

    # ---- in -------------------------------------------------------------------------------------

    async def _read(self) -> None:
        reason, retry_after_s = "the session's reader failed", None
        decode = SessionUpdateDecoder().decode
        try:
            async for pb in self._call:
                self._deliver(decode(pb))
            reason = "it ended the session"
        except grpc.aio.AioRpcError as error:
            cause = from_rpc_error(error)
            reason, retry_after_s = cause.message, cause.retry_after_s
        except InvalidRequest as error:
            reason = f"it sent what can't be read: {error.message}"
        finally:
            lost = RouterUnavailable(
                f"router {self._address} was lost: {reason}", retry_after_s=retry_after_s
            )
            self._end(AttemptFailed(lost, lost_router=True))

    def _deliver(self, update: SessionUpdate) -> None:
        mailboxes = self._mailboxes
        if update.logprobs or len(update.token_ids) != len(update.stream_ids):
            self._deliver_columns(update)
        else:
            self._deliver_one_each(update)
        for stream_id, finished in update.finished:
            if mailbox := mailboxes.pop(stream_id, None):
                mailbox.put_end(finished)
        for stream_id, error in update.failed:
            if mailbox := mailboxes.pop(stream_id, None):
                # One that drains refuses new calls, and another router is to be asked at once.
                mailbox.put_end(AttemptFailed(error, lost_router=isinstance(error, RouterUnavailable)))

    def _deliver_one_each(self, update: SessionUpdate) -> None:
        now_s, find = self._now_s(), self._mailboxes.get
        for stream_id, token_id in zip(update.stream_ids, update.token_ids, strict=True):
            mailbox = find(stream_id)
            if mailbox is not None and not mailbox.put_token(token_id, now_s):
                self._fail_slow_reader(stream_id)

    def _deliver_columns(self, update: SessionUpdate) -> None:
        now_s, start = self._now_s(), 0
        token_ids, logprobs = update.token_ids, update.logprobs
        for stream_id, count in zip(update.stream_ids, update.counts, strict=True):
            end = start + count
            mailbox = self._mailboxes.get(stream_id)
            if mailbox is not None and not mailbox.put_tokens(
                token_ids[start:end], logprobs[start:end], now_s
            ):
                self._fail_slow_reader(stream_id)
            start = end

    def _fail_slow_reader(self, stream_id: int) -> None:
        mailbox = self._mailboxes[stream_id]
        self.cancel(stream_id)
        error = Overloaded("the request was cancelled: its reader fell more than max_buffered_tokens behind")
        mailbox.put_end(AttemptFailed(error, is_final=True))

    def _end(self, end: AttemptFailed) -> None:
        self._is_closed = True
        self._call.cancel()
        mailboxes, self._mailboxes = self._mailboxes, {}
        self._calls.clear()
        self._cancels.clear()
        self._finishes.clear()
        self._news.set()
        for mailbox in mailboxes.values():
            mailbox.put_end(end)
