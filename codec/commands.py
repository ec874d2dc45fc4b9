"""A router's commands, and the requests in them."""

from __future__ import annotations

from typing import Final

from kvrelay.codec.bounds import MAX_CACHE_SALT_BYTES, MAX_INT32, length, text, token_ids, whole
from kvrelay.codec.node_hello import MAX_NAME_CHARS
from kvrelay.codec.sampling import decode_sampling, encode_sampling
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.ids import AttemptId
from kvrelay.core.node_messages import (
    Command,
    PullOrder,
    ReleaseKV,
    ReserveDecode,
    SendKVSnapshot,
    SendPrefix,
    StartDrain,
    StartPrefill,
    StopPull,
)
from kvrelay.core.request import Prefix, TokenRequest
from kvrelay.v1 import cluster_pb2

_START: Final = "commands.start_prefill"
_SEND: Final = "commands.send_prefix"


def encode_command(command: Command) -> cluster_pb2.Command:
    """One command."""
    match command:
        case StartPrefill(attempt):
            return cluster_pb2.Command(attempt=attempt, start_prefill=_encode_start_prefill(command))
        case ReserveDecode(attempt, request):
            reserve = cluster_pb2.ReserveDecode(request=encode_token_request(request))
            return cluster_pb2.Command(attempt=attempt, reserve_decode=reserve)
        case SendPrefix(attempt, prefix, address):
            send = cluster_pb2.SendPrefix(
                token_ids=prefix.token_ids, cache_salt=prefix.cache_salt, address=address
            )
            return cluster_pb2.Command(attempt=attempt, send_prefix=send)
        case StopPull(attempt):
            return cluster_pb2.Command(attempt=attempt, stop_pull=cluster_pb2.StopPull())
        case ReleaseKV(attempt):
            return cluster_pb2.Command(attempt=attempt, release_kv=cluster_pb2.ReleaseKV())
        case SendKVSnapshot():
            return cluster_pb2.Command(send_kv_snapshot=cluster_pb2.SendKVSnapshot())
        case StartDrain():
            return cluster_pb2.Command(start_drain=cluster_pb2.StartDrain())


def decode_command(pb: cluster_pb2.Command) -> Command:
    """One command.

    Raises:
        InvalidRequest: it has no kind that this version knows, or a field is out of range.
    """
    kind = pb.WhichOneof("kind")
    if kind == "send_kv_snapshot":
        return SendKVSnapshot()
    if kind == "start_drain":
        return StartDrain()
    if pb.attempt == 0:
        raise InvalidRequest("commands.attempt must be at least 1", field="commands.attempt")
    attempt = AttemptId(pb.attempt)
    match kind:
        case "start_prefill":
            return _decode_start_prefill(attempt, pb.start_prefill)
        case "reserve_decode":
            return ReserveDecode(attempt, decode_token_request(pb.reserve_decode.request))
        case "send_prefix":
            return _decode_send_prefix(attempt, pb.send_prefix)
        case "stop_pull":
            return StopPull(attempt)
        case "release_kv":
            return ReleaseKV(attempt)
        case _:
            raise InvalidRequest("commands.kind is missing or unknown", field="commands.kind")


def _encode_start_prefill(command: StartPrefill) -> cluster_pb2.StartPrefill:
    pull = command.pull
    return cluster_pb2.StartPrefill(
        request=encode_token_request(command.request),
        decode_address=command.decode_address,
        pull_attempt=pull.attempt if pull else 0,
        num_pull_tokens=pull.num_tokens if pull else 0,
    )


def _decode_start_prefill(attempt: AttemptId, pb: cluster_pb2.StartPrefill) -> StartPrefill:
    address = text(pb.decode_address, f"{_START}.decode_address", MAX_NAME_CHARS, is_required=True)
    request = decode_token_request(pb.request)
    pull: PullOrder | None = None
    if pb.pull_attempt:
        num_tokens = whole(pb.num_pull_tokens, f"{_START}.num_pull_tokens", 1, len(request.token_ids))
        pull = PullOrder(AttemptId(pb.pull_attempt), num_tokens)
    return StartPrefill(attempt, request, address, pull)


def _decode_send_prefix(attempt: AttemptId, pb: cluster_pb2.SendPrefix) -> SendPrefix:
    length(len(pb.cache_salt), f"{_SEND}.cache_salt", MAX_CACHE_SALT_BYTES)
    address = text(pb.address, f"{_SEND}.address", MAX_NAME_CHARS, is_required=True)
    whole(len(pb.token_ids), f"{_SEND}.token_ids", 1, MAX_INT32)
    return SendPrefix(attempt, Prefix(token_ids(pb.token_ids, f"{_SEND}.token_ids"), pb.cache_salt), address)


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
