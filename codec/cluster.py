"""The frames of `Attach`, both ways. Hello and welcome, commands, reports, tokens and KV
events have own files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Final

from kvrelay.codec.bounds import whole
from kvrelay.codec.commands import (
    decode_command,
    decode_token_request,
    encode_command,
    encode_token_request,
)
from kvrelay.codec.kv_event import decode_kv_event, encode_kv_event
from kvrelay.codec.node_hello import (
    decode_digest,
    decode_hello,
    decode_welcome,
    encode_hello,
    encode_welcome,
)
from kvrelay.codec.reports import decode_report, encode_report
from kvrelay.codec.token_batch import (
    TokenBatchDecoder,
    TokenBatchEncoder,
    decode_token_batch,
    encode_token_batch,
)
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.node_messages import NodeFrame, NodeLoad, RouterFrame, TokenBatch
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
    return cluster_pb2.RouterFrame(commands=[encode_command(command) for command in frame.commands])


def decode_router_frame(pb: cluster_pb2.RouterFrame) -> RouterFrame:
    """Any frame but the first.

    Raises:
        InvalidRequest: a second welcome, an unknown command, or a field is out of range.
    """
    if pb.HasField("welcome"):
        raise InvalidRequest("welcome came again", field="welcome")
    return RouterFrame(tuple(decode_command(command) for command in pb.commands))
