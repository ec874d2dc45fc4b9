"""One generation as clients ask for it and hear of it: what `Generate` sends singly and `Session` batches."""

from __future__ import annotations

from typing import Any, Final

from kvrelay.codec.bounds import MAX_CACHE_SALT_BYTES, length, seconds, text, token_ids, whole
from kvrelay.codec.sampling import (
    decode_finish_reason,
    decode_logprobs,
    decode_sampling,
    encode_finish_reason,
    encode_logprobs,
    encode_sampling,
)
from kvrelay.codec.service_terms import decode_terms, decode_timeout, encode_priority
from kvrelay.core.client_types import (
    MAX_MODEL_CHARS,
    MAX_REQUEST_ID_CHARS,
    CallAccepted,
    CallEvent,
    CallFinished,
    CallTokens,
    GenerateCall,
)
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.request import TokenRequest
from kvrelay.core.request_report import RequestReport
from kvrelay.core.sampling import MAX_SEED
from kvrelay.v1 import router_pb2

_MAX_UINT32: Final = 2**32 - 1
_MAX_NODE_CHARS: Final = 256


def encode_generate(call: GenerateCall) -> router_pb2.GenerateRequest:
    """A client's call.

    Raises:
        InvalidRequest: a token id does not fit the wire.
    """
    tokens, num_prompt = call.request.token_ids, call.request.num_prompt_tokens
    if max(tokens) > _MAX_UINT32:
        raise InvalidRequest(f"prompt_token_ids holds {max(tokens)}", field="prompt_token_ids")
    return router_pb2.GenerateRequest(
        request_id=call.request_id,
        model=call.model,
        prompt_token_ids=tokens[:num_prompt],
        output_token_ids=tokens[num_prompt:],
        sampling=encode_sampling(call.request.sampling),
        timeout_s=call.timeout_s,
        cache_salt=call.request.cache_salt,
        priority=encode_priority(call.terms.priority),
        tenant=call.terms.tenant,
        ttft_timeout_s=call.terms.ttft_timeout_s,
    )


def decode_generate(pb: router_pb2.GenerateRequest) -> GenerateCall:
    """A client's call.

    Raises:
        InvalidRequest: a field is out of range.
    """
    request_id = text(pb.request_id, "request_id", MAX_REQUEST_ID_CHARS)
    model = text(pb.model, "model", MAX_MODEL_CHARS)
    timeout_s = decode_timeout(pb.timeout_s, "timeout_s") if pb.HasField("timeout_s") else None
    terms = decode_terms(pb)
    length(len(pb.cache_salt), "cache_salt", MAX_CACHE_SALT_BYTES)
    prompt = token_ids(pb.prompt_token_ids, "prompt_token_ids")
    output = token_ids(pb.output_token_ids, "output_token_ids") if pb.output_token_ids else ()
    sampling = decode_sampling(pb.sampling)
    if len(output) > sampling.max_tokens:
        raise InvalidRequest(
            f"output_token_ids has {len(output)} entries, sampling.max_tokens is {sampling.max_tokens}",
            field="output_token_ids",
        )
    if not prompt:
        raise InvalidRequest("prompt_token_ids must hold at least one token", field="prompt_token_ids")
    request = TokenRequest(prompt + output, len(prompt), sampling, pb.cache_salt)
    return GenerateCall(request_id, model, request, timeout_s, terms)


def encode_accepted(accepted: CallAccepted) -> router_pb2.Accepted:
    """The answer to a call that was taken."""
    return router_pb2.Accepted(request_id=accepted.request_id, seed=accepted.seed)


def decode_accepted(pb: router_pb2.Accepted) -> CallAccepted:
    """Raises InvalidRequest."""
    seed = whole(pb.seed, "accepted.seed", 0, MAX_SEED) if pb.HasField("seed") else None
    return CallAccepted(
        text(pb.request_id, "accepted.request_id", MAX_REQUEST_ID_CHARS, is_required=True), seed
    )


def encode_finished(finished: CallFinished) -> router_pb2.Finished:
    """A call's end."""
    return router_pb2.Finished(
        finish_reason=encode_finish_reason(finished.finish_reason), report=encode_report(finished.report)
    )


def decode_finished(pb: router_pb2.Finished) -> CallFinished:
    """Raises InvalidRequest."""
    return CallFinished(
        decode_finish_reason(pb.finish_reason, "finished.finish_reason"), decode_report(pb.report)
    )


def encode_report(report: RequestReport) -> router_pb2.RequestReport:
    """All fields."""
    return router_pb2.RequestReport(
        prefill_node=report.prefill_node,
        decode_node=report.decode_node,
        num_attempts=report.num_attempts,
        num_prompt_tokens=report.num_prompt_tokens,
        num_output_tokens=report.num_output_tokens,
        num_cached_tokens=report.num_cached_tokens,
        queue_s=report.queue_s,
        ttft_s=report.ttft_s,
        total_s=report.total_s,
        kv_bytes=report.kv_bytes,
        kv_messages=report.kv_messages,
        kv_seconds=report.kv_seconds,
        kv_transport=report.kv_transport,
        num_pulled_tokens=report.num_pulled_tokens,
    )


def decode_report(pb: router_pb2.RequestReport) -> RequestReport:
    """Raises InvalidRequest."""
    names: dict[str, Any] = {
        name: text(getattr(pb, name), f"report.{name}", _MAX_NODE_CHARS)
        for name in ("prefill_node", "decode_node", "kv_transport")
    }
    times: dict[str, Any] = {
        name: seconds(getattr(pb, name), f"report.{name}")
        for name in ("queue_s", "ttft_s", "total_s", "kv_seconds")
    }
    return RequestReport(
        **names,
        **times,
        num_attempts=pb.num_attempts,
        num_prompt_tokens=pb.num_prompt_tokens,
        num_output_tokens=pb.num_output_tokens,
        num_cached_tokens=pb.num_cached_tokens,
        kv_bytes=pb.kv_bytes,
        kv_messages=pb.kv_messages,
        num_pulled_tokens=pb.num_pulled_tokens,
    )


def encode_call_event(event: CallEvent) -> router_pb2.GenerateResponse:
    """One message of a `Generate` stream."""
    match event:
        case CallAccepted():
            return router_pb2.GenerateResponse(accepted=encode_accepted(event))
        case CallTokens():
            tokens = router_pb2.Tokens(
                token_ids=event.token_ids,
                logprobs=encode_logprobs(event.logprobs) if event.logprobs else None,
            )
            return router_pb2.GenerateResponse(tokens=tokens)
        case CallFinished():
            return router_pb2.GenerateResponse(finished=encode_finished(event))


def decode_call_event(pb: router_pb2.GenerateResponse) -> CallEvent:
    """One message of a `Generate` stream.

    Raises:
        InvalidRequest: of no known kind, or a field is out of range.
    """
    kind = pb.WhichOneof("kind")
    if kind == "accepted":
        return decode_accepted(pb.accepted)
    if kind == "tokens":
        ids = token_ids(pb.tokens.token_ids, "tokens.token_ids")
        return CallTokens(ids, decode_logprobs(pb.tokens.logprobs, len(ids)) if pb.tokens.logprobs else ())
    if kind == "finished":
        return decode_finished(pb.finished)
    raise InvalidRequest("kind is missing or unknown", field="kind")
