"""The frames of `Attach`, both ways. Hello and welcome, reports, tokens and KV events have own files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Final

from kvrelay.codec.bounds import MAX_CACHE_SALT_BYTES, length, text, token_ids, whole
from kvrelay.codec.kv_event import decode_kv_event, encode_kv_event
from kvrelay.codec.node_hello import (
    MAX_NAME_CHARS,
    decode_digest,
    decode_hello,
    decode_welcome,
    encode_hello,
    encode_welcome,
)
from kvrelay.codec.reports import decode_report, encode_report
from kvrelay.codec.sampling import decode_sampling, encode_sampling
from kvrelay.codec.token_batch import (
    TokenBatchDecoder,
    TokenBatchEncoder,
    decode_token_batch,
    encode_token_batch,
)
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.ids import AttemptId
from kvrelay.core.node_messages import (
    Command,
    NodeFrame,
    NodeLoad,
    ReleaseKV,
    ReserveDecode,
    RouterFrame,
    SendKVSnapshot,
    StartPrefill,
    TokenBatch,
)
from kvrelay.core.request import TokenRequest
from kvrelay.core.tokenizer_chunk import MAX_TOKENIZER_BYTES, TokenizerChunk
from kvrelay.v1 import cluster_pb2, common_pb2

__all__ = [
    "TokenBatchDecoder",
    "TokenBatchEncoder",
    "decode_hello",
    "decode_node_frame",
    "decode_node_load",
    "decode_router_frame",
    "decode_token_batch",
    "decode_token_request",
    "decode_tokenizer_chunk",
    "decode_welcome",
    "encode_hello",
    "encode_node_frame",
    "encode_node_load",
    "encode_router_frame",
    "encode_token_batch",
    "encode_token_request",
    "encode_tokenizer_chunk",
    "encode_welcome",
]

_LOAD_FIELDS: Final = tuple(spec.name for spec in fields(NodeLoad))


# ---- node -> router --------------------------------------------------------------------------------


def encode_node_frame(
    frame: NodeFrame, encode_tokens: Callable[[TokenBatch], cluster_pb2.TokenBatch] = encode_token_batch
) -> cluster_pb2.NodeFrame:
    """Any frame but the first. `encode_tokens` may be that of the stream's `TokenBatchEncoder`."""
    return cluster_pb2.NodeFrame(
        tokens=encode_tokens(frame.tokens) if frame.tokens is not None else None,
        reports=[encode_report(report) for report in frame.reports],
        load=encode_node_load(frame.load) if frame.load is not None else None,
        tokenizer=encode_tokenizer_chunk(frame.tokenizer) if frame.tokenizer is not None else None,
        kv=encode_kv_event(frame.kv) if frame.kv is not None else None,
    )


def decode_node_frame(
    pb: cluster_pb2.NodeFrame,
    decode_tokens: Callable[[cluster_pb2.TokenBatch], TokenBatch] = decode_token_batch,
) -> NodeFrame:
    """Any frame but the first. `decode_tokens` may be that of the stream's `TokenBatchDecoder`.

    Raises:
        InvalidRequest: a second hello, or a field is out of range.
    """
    if pb.HasField("hello"):
        raise InvalidRequest("hello came again", field="hello")
    return NodeFrame(
        tokens=decode_tokens(pb.tokens) if pb.HasField("tokens") else None,
        reports=tuple(decode_report(report) for report in pb.reports) if pb.reports else (),
        load=decode_node_load(pb.load) if pb.HasField("load") else None,
        tokenizer=decode_tokenizer_chunk(pb.tokenizer) if pb.HasField("tokenizer") else None,
        kv=decode_kv_event(pb.kv) if pb.HasField("kv") else None,
    )


def encode_node_load(load: NodeLoad) -> common_pb2.NodeLoad:
    """All figures."""
    return common_pb2.NodeLoad(**{name: getattr(load, name) for name in _LOAD_FIELDS})


def decode_node_load(pb: common_pb2.NodeLoad) -> NodeLoad:
    """All figures; any value is taken."""
    return NodeLoad(*[getattr(pb, name) for name in _LOAD_FIELDS])


def encode_tokenizer_chunk(chunk: TokenizerChunk) -> common_pb2.TokenizerChunk:
    """One chunk."""
    return common_pb2.TokenizerChunk(
        digest=chunk.digest,
        total_bytes=chunk.total_bytes,
        offset_bytes=chunk.offset_bytes,
        data=chunk.data,
    )


def decode_tokenizer_chunk(pb: common_pb2.TokenizerChunk) -> TokenizerChunk:
    """One chunk; whether it fits its bundle is `TokenizerAssembly`'s to say.

    Raises:
        InvalidRequest: digest or size is out of range.
    """
    if not pb.digest:
        raise InvalidRequest("tokenizer.digest must not be empty", field="tokenizer.digest")
    return TokenizerChunk(
        digest=decode_digest(pb.digest, "tokenizer.digest"),
        total_bytes=whole(pb.total_bytes, "tokenizer.total_bytes", 1, MAX_TOKENIZER_BYTES),
        offset_bytes=whole(pb.offset_bytes, "tokenizer.offset_bytes", 0, MAX_TOKENIZER_BYTES),
        data=pb.data,
    )


# ---- router -> node --------------------------------------------------------------------------------


def encode_router_frame(frame: RouterFrame) -> cluster_pb2.RouterFrame:
    """Any frame but the first."""
    return cluster_pb2.RouterFrame(commands=[_encode_command(command) for command in frame.commands])


def decode_router_frame(pb: cluster_pb2.RouterFrame) -> RouterFrame:
    """Any frame but the first.

    Raises:
        InvalidRequest: a second welcome, an unknown command, or a field is out of range.
    """
    if pb.HasField("welcome"):
        raise InvalidRequest("welcome came again", field="welcome")
    return RouterFrame(tuple(_decode_command(command) for command in pb.commands))


def _encode_command(command: Command) -> cluster_pb2.Command:
    match command:
        case StartPrefill(attempt, request, decode_address):
            start = cluster_pb2.StartPrefill(
                request=encode_token_request(request), decode_address=decode_address
            )
            return cluster_pb2.Command(attempt=attempt, start_prefill=start)
        case ReserveDecode(attempt, request):
            reserve = cluster_pb2.ReserveDecode(request=encode_token_request(request))
            return cluster_pb2.Command(attempt=attempt, reserve_decode=reserve)
        case ReleaseKV(attempt):
            return cluster_pb2.Command(attempt=attempt, release_kv=cluster_pb2.ReleaseKV())
        case SendKVSnapshot():
            return cluster_pb2.Command(send_kv_snapshot=cluster_pb2.SendKVSnapshot())


def _decode_command(pb: cluster_pb2.Command) -> Command:
    kind = pb.WhichOneof("kind")
    if kind == "send_kv_snapshot":
        return SendKVSnapshot()
    if pb.attempt == 0:
        raise InvalidRequest("commands.attempt must be at least 1", field="commands.attempt")
    attempt = AttemptId(pb.attempt)
    if kind == "start_prefill":
        return _decode_start_prefill(attempt, pb.start_prefill)
    if kind == "reserve_decode":
        return ReserveDecode(attempt, decode_token_request(pb.reserve_decode.request))
    if kind == "release_kv":
        return ReleaseKV(attempt)
    raise InvalidRequest("commands.kind is missing or unknown", field="commands.kind")


def _decode_start_prefill(attempt: AttemptId, pb: cluster_pb2.StartPrefill) -> StartPrefill:
    field = "commands.start_prefill.decode_address"
    address = text(pb.decode_address, field, MAX_NAME_CHARS, is_required=True)
    return StartPrefill(attempt, decode_token_request(pb.request), address)


def encode_token_request(request: TokenRequest) -> cluster_pb2.TokenRequest:
    """A request as nodes get it."""
    return cluster_pb2.TokenRequest(
        token_ids=request.token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
        sampling=encode_sampling(request.sampling),
        cache_salt=request.cache_salt,
    )


def decode_token_request(pb: cluster_pb2.TokenRequest) -> TokenRequest:
    """A request as nodes get it.

    Raises:
        InvalidRequest: a field is out of range.
    """
    length(len(pb.cache_salt), "cache_salt", MAX_CACHE_SALT_BYTES)
    return TokenRequest(
        token_ids=token_ids(pb.token_ids, "prompt_token_ids"),
        num_prompt_tokens=pb.num_prompt_tokens,
        sampling=decode_sampling(pb.sampling),
        cache_salt=pb.cache_salt,
    )
