"""The messages of `Session`: many calls on one stream, in batches both ways; tokens in columns."""

from __future__ import annotations

from typing import Final

from kvrelay.codec.bounds import MAX_TOKEN_ID
from kvrelay.codec.errors import decode_failed, encode_failed
from kvrelay.codec.generate import (
    decode_accepted,
    decode_finished,
    decode_generate,
    encode_accepted,
    encode_finished,
    encode_generate,
)
from kvrelay.codec.sampling import decode_logprobs, encode_logprobs
from kvrelay.core.client_types import GenerateCall, SessionAsk, SessionUpdate
from kvrelay.core.errors import InvalidRequest, KVRelayError
from kvrelay.v1 import router_pb2

MAX_CALLS_PER_ASK: Final = 4096


def encode_session_ask(ask: SessionAsk) -> router_pb2.SessionRequest:
    """A client's message. Every call must be a `GenerateCall`."""
    generate = []
    for stream_id, call in ask.calls:
        assert isinstance(call, GenerateCall), "an error can't be asked for"
        generate.append(router_pb2.SessionGenerate(stream_id=stream_id, request=encode_generate(call)))
    return router_pb2.SessionRequest(generate=generate, cancel=ask.cancel)


def decode_session_ask(pb: router_pb2.SessionRequest) -> SessionAsk:
    """A client's message; a call that is not valid comes back as the error to fail its stream with.

    Raises:
        InvalidRequest: too many calls in one message.
    """
    if len(pb.generate) > MAX_CALLS_PER_ASK:
        raise InvalidRequest(
            f"generate has {len(pb.generate)} entries, at most {MAX_CALLS_PER_ASK} in one message",
            field="generate",
        )
    calls = tuple((entry.stream_id, _call_or_error(entry)) for entry in pb.generate)
    return SessionAsk(calls, tuple(pb.cancel))


def _call_or_error(entry: router_pb2.SessionGenerate) -> GenerateCall | KVRelayError:
    try:
        return decode_generate(entry.request)
    except KVRelayError as error:
        return error


def encode_session_update(update: SessionUpdate) -> router_pb2.SessionResponse:
    """A router's message. The hot path: whole columns, no object per token."""
    return router_pb2.SessionResponse(
        stream_ids=update.stream_ids,
        counts=update.counts,
        token_ids=update.token_ids,
        logprobs=encode_logprobs(update.logprobs) if update.logprobs else None,
        accepted=[
            router_pb2.SessionAccepted(stream_id=stream_id, accepted=encode_accepted(accepted))
            for stream_id, accepted in update.accepted
        ],
        finished=[
            router_pb2.SessionFinished(stream_id=stream_id, finished=encode_finished(finished))
            for stream_id, finished in update.finished
        ],
        failed=[
            router_pb2.SessionFailed(stream_id=stream_id, failed=encode_failed(error))
            for stream_id, error in update.failed
        ],
    )


def decode_session_update(pb: router_pb2.SessionResponse) -> SessionUpdate:
    """A router's message.

    Raises:
        InvalidRequest: columns do not fit together, or a field is out of range.
    """
    stream_ids, counts, ids = pb.stream_ids[:], pb.counts[:], pb.token_ids[:]
    if len(stream_ids) != len(counts) or 0 in counts or sum(counts) != len(ids):
        raise InvalidRequest(
            "counts must be at least 1 each, one per entry of stream_ids, and add up to the token_ids",
            field="counts",
        )
    if ids and max(ids) > MAX_TOKEN_ID:
        raise InvalidRequest(f"token_ids holds {max(ids)}, at most {MAX_TOKEN_ID}", field="token_ids")
    return SessionUpdate(
        stream_ids,
        counts,
        ids,
        list(decode_logprobs(pb.logprobs, len(ids))) if pb.logprobs else [],
        [(entry.stream_id, decode_accepted(entry.accepted)) for entry in pb.accepted],
        [(entry.stream_id, decode_finished(entry.finished)) for entry in pb.finished],
        [(entry.stream_id, decode_failed(entry.failed)) for entry in pb.failed],
    )
