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
from kvrelay.codec.row_sets import ReceivedRows, Rows, SentRows
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
    return router_pb2.SessionRequest(generate=generate, cancel=ask.cancel, finish=ask.finish)


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
    return SessionAsk(calls, tuple(pb.cancel), tuple(pb.finish))


def _call_or_error(entry: router_pb2.SessionGenerate) -> GenerateCall | KVRelayError:
    try:
        return decode_generate(entry.request)
    except KVRelayError as error:
        return error


class SessionUpdateEncoder:
    """Encodes the messages of one session, each of which must be sent, in order."""

    def __init__(self) -> None:
        self._sent_rows = SentRows()

    def encode(self, update: SessionUpdate) -> router_pb2.SessionResponse:
        """A router's message; the columns of `update` must not change afterwards."""
        if not update.token_ids:
            return encode_session_update(update)
        number = self._sent_rows.find(update.stream_ids, update.counts)
        if number == 0:
            number = self._sent_rows.add(update.stream_ids, update.counts)
            pb = encode_session_update(update)
            pb.row_set = number
            return pb
        pb = router_pb2.SessionResponse(row_set=number, token_ids=update.token_ids)
        _add_answers(pb, update)
        return pb


class SessionUpdateDecoder:
    """Decodes the messages of one session, in order."""

    def __init__(self) -> None:
        self._received_rows = ReceivedRows()

    def decode(self, pb: router_pb2.SessionResponse) -> SessionUpdate:
        """A router's message.

        Raises:
            InvalidRequest: columns do not fit together or are missing, or a field is out of range.
        """
        if not pb.row_set:
            return decode_session_update(pb)
        if not pb.stream_ids and not pb.counts:
            return _decode_update(pb, self._received_rows.get(pb.row_set))
        update = decode_session_update(pb)
        self._received_rows.put(pb.row_set, update.stream_ids, update.counts)
        return update


def encode_session_update(update: SessionUpdate) -> router_pb2.SessionResponse:
    """A router's message with all columns. The hot path: no object per token."""
    pb = router_pb2.SessionResponse(
        stream_ids=update.stream_ids, counts=update.counts, token_ids=update.token_ids
    )
    _add_answers(pb, update)
    return pb


def _add_answers(pb: router_pb2.SessionResponse, update: SessionUpdate) -> None:
    """All that most messages have none of."""
    if update.logprobs:
        pb.logprobs.extend(encode_logprobs(update.logprobs))
    for stream_id, accepted in update.accepted:
        pb.accepted.add(stream_id=stream_id, accepted=encode_accepted(accepted))
    for stream_id, finished in update.finished:
        pb.finished.add(stream_id=stream_id, finished=encode_finished(finished))
    for stream_id, error in update.failed:
        pb.failed.add(stream_id=stream_id, failed=encode_failed(error))


def decode_session_update(pb: router_pb2.SessionResponse) -> SessionUpdate:
    """A router's message with all columns.

    Raises:
        InvalidRequest: columns do not fit together, or a field is out of range.
    """
    return _decode_update(pb, (pb.stream_ids[:], pb.counts[:]))


def _decode_update(pb: router_pb2.SessionResponse, rows: Rows) -> SessionUpdate:
    (stream_ids, counts), ids = rows, pb.token_ids[:]
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
        decode_logprobs(pb.logprobs, len(ids)) if pb.logprobs else (),
        [(entry.stream_id, decode_accepted(entry.accepted)) for entry in pb.accepted],
        [(entry.stream_id, decode_finished(entry.finished)) for entry in pb.finished],
        [(entry.stream_id, decode_failed(entry.failed)) for entry in pb.failed],
    )
