"""The client-facing calls that generate: `Generate` (one request a stream), `Session` (many), `Cancel`."""

from __future__ import annotations

import asyncio

from kvrelay.codec.client_api import (
    SessionUpdateEncoder,
    decode_cancel,
    decode_generate,
    decode_session_ask,
    encode_call_event,
)
from kvrelay.core.client_types import CallTokens, SessionUpdate
from kvrelay.router.grpc_handlers import Context, read_message
from kvrelay.router.sessions import ClientSession
from kvrelay.router.shell import RouterShell
from kvrelay.v1 import router_pb2

_ONLY_STREAM = 0


class GenerateService:
    """Relays between client streams and the shell's outboxes."""

    def __init__(self, shell: RouterShell) -> None:
        self._shell = shell

    async def generate(self, request: router_pb2.GenerateRequest, context: Context) -> None:
        """One request. The call's end, however it comes, frees what the request holds.

        Raises:
            KVRelayError: why the request was refused or failed.
        """
        call = decode_generate(request)
        session = self._shell.open_session(context.peer())
        try:
            self._shell.submit(session, _ONLY_STREAM, call)
            while (update := await session.outbox.take()) is not None:
                self._shell.metrics.num_session_messages += 1
                if await _write_events(context, update):
                    return
        finally:
            self._shell.close_session(session)

    async def session(self, context: Context) -> None:
        """Many requests. The stream's end, however it comes, frees what they hold.

        Raises:
            InvalidRequest: a message as a whole can't be understood.
        """
        session = self._shell.open_session(context.peer())
        reading = asyncio.create_task(self._read_session(session, context))
        try:
            await self._write_session(session, context)
            if reading.done():
                await reading
        finally:
            self._shell.close_session(session)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read_session(self, session: ClientSession, context: Context) -> None:
        try:
            while (received := await read_message(context)) is not None:
                ask = decode_session_ask(received)
                for stream_id, call in ask.calls:
                    self._shell.submit(session, stream_id, call)
                for stream_id in ask.cancel:
                    self._shell.cancel_stream(session, stream_id)
                for stream_id in ask.finish:
                    self._shell.finish_stream(session, stream_id)
                await session.outbox.has_room_for_calls()
        finally:
            session.outbox.close()

    async def _write_session(self, session: ClientSession, context: Context) -> None:
        outbox, metrics, encode = session.outbox, self._shell.metrics, SessionUpdateEncoder().encode
        while (update := await outbox.take()) is not None:
            metrics.num_session_messages += 1
            await context.write(encode(update))

    async def cancel(self, request: router_pb2.CancelRequest, context: Context) -> router_pb2.CancelResponse:
        """Cancel by request id.

        Raises:
            UnknownRequest: no live request has it.
        """
        self._shell.cancel_request(decode_cancel(request))
        return router_pb2.CancelResponse()


async def _write_events(context: Context, update: SessionUpdate) -> bool:
    """One request's part of an update, which is all of it; returns whether that was its end."""
    for _, accepted in update.accepted:
        await context.write(encode_call_event(accepted))
    if update.token_ids:
        await context.write(encode_call_event(CallTokens(update.token_ids, update.logprobs)))
    for _, finished in update.finished:
        await context.write(encode_call_event(finished))
    for _, error in update.failed:
        raise error
    return bool(update.finished)
