"""A placement with its candidates and measurements, as `Explain` answers it."""

from __future__ import annotations

from typing import Any, Final

from kvrelay.codec.bounds import cut, finite, length, seconds, text
from kvrelay.codec.node_hello import MAX_NAME_CHARS
from kvrelay.codec.sampling import decode_finish_reason, encode_finish_reason
from kvrelay.core.client_types import MAX_MODEL_CHARS, MAX_REQUEST_ID_CHARS
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.explanation import Candidate, Decision, Explanation, MeasuredRequest
from kvrelay.core.ids import NodeId, RequestId
from kvrelay.core.node_messages import Role
from kvrelay.v1 import router_pb2

MAX_CANDIDATES: Final = 65_536
MAX_TERMS: Final = 64
_MEASURED_TIMES: Final = (
    "ttft_s", "total_s", "placed_ttft_s", "prefill_queue_s", "prefill_compute_s", "handoff_s",
)  # fmt: skip


def encode_explanation(explanation: Explanation) -> router_pb2.ExplainResponse:
    """All of it; texts that people wrote are cut to what an error's text may have."""
    return router_pb2.ExplainResponse(
        request_id=explanation.request_id,
        router_id=explanation.router_id,
        model=explanation.model,
        placed_ago_s=explanation.placed_ago_s,
        decision=_encode_decision(explanation.decision),
        measured=_encode_measured(explanation.measured),
    )


def decode_explanation(pb: router_pb2.ExplainResponse) -> Explanation:
    """All of it.

    Raises:
        InvalidRequest: a field is out of range.
    """
    return Explanation(
        request_id=RequestId(text(pb.request_id, "request_id", MAX_REQUEST_ID_CHARS, is_required=True)),
        model=text(pb.model, "model", MAX_MODEL_CHARS),
        placed_ago_s=seconds(pb.placed_ago_s, "placed_ago_s"),
        decision=_decode_decision(pb.decision),
        measured=_decode_measured(pb.measured),
        router_id=text(pb.router_id, "router_id", MAX_NAME_CHARS),
    )


def _encode_decision(decision: Decision) -> router_pb2.Decision:
    return router_pb2.Decision(
        policy=decision.policy,
        prefill_node=decision.prefill_node,
        decode_node=decision.decode_node,
        predicted_ttft_s=decision.predicted_ttft_s,
        pull_from=decision.pull_from or "",
        num_pull_tokens=decision.num_pull_tokens,
        candidates=[
            router_pb2.Candidate(
                node_id=candidate.node_id,
                role=candidate.role.value,
                score=candidate.score,
                terms=[router_pb2.ScoreTerm(name=name, value=value) for name, value in candidate.terms],
                objection=cut(candidate.objection),
            )
            for candidate in decision.candidates
        ],
    )


def _decode_decision(pb: router_pb2.Decision) -> Decision:
    length(len(pb.candidates), "decision.candidates", MAX_CANDIDATES)
    return Decision(
        prefill_node=_decode_node_id(pb.prefill_node, "decision.prefill_node"),
        decode_node=_decode_node_id(pb.decode_node, "decision.decode_node"),
        candidates=tuple(_decode_candidate(candidate) for candidate in pb.candidates),
        policy=text(pb.policy, "decision.policy", MAX_NAME_CHARS),
        predicted_ttft_s=_optional_seconds(pb, "predicted_ttft_s", "decision"),
        pull_from=_decode_node_id(pb.pull_from, "decision.pull_from") if pb.pull_from else None,
        num_pull_tokens=pb.num_pull_tokens,
    )


def _decode_candidate(pb: router_pb2.Candidate) -> Candidate:
    if pb.role not in tuple(Role):
        raise InvalidRequest(f"candidates.role is {pb.role!r}, which is no role", field="candidates.role")
    length(len(pb.terms), "candidates.terms", MAX_TERMS)
    return Candidate(
        node_id=_decode_node_id(pb.node_id, "candidates.node_id"),
        role=Role(pb.role),
        score=finite(pb.score, "candidates.score"),
        terms=tuple(
            (text(term.name, "terms.name", MAX_NAME_CHARS), finite(term.value, "terms.value"))
            for term in pb.terms
        ),
        objection=cut(pb.objection),
    )


def _decode_node_id(node_id: str, field: str) -> NodeId:
    return NodeId(text(node_id, field, MAX_NAME_CHARS, is_required=True))


def _encode_measured(measured: MeasuredRequest) -> router_pb2.MeasuredRequest:
    reason = measured.finish_reason
    return router_pb2.MeasuredRequest(
        state=measured.state,
        num_attempts=measured.num_attempts,
        num_prompt_tokens=measured.num_prompt_tokens,
        num_output_tokens=measured.num_output_tokens,
        queue_s=measured.queue_s,
        ttft_s=measured.ttft_s,
        total_s=measured.total_s,
        finish_reason=encode_finish_reason(reason) if reason is not None else None,
        error_code=measured.error_code,
        error_message=cut(measured.error_message),
        placed_ttft_s=measured.placed_ttft_s,
        num_cached_tokens=measured.num_cached_tokens,
        prefill_queue_s=measured.prefill_queue_s,
        prefill_compute_s=measured.prefill_compute_s,
        kv_bytes=measured.kv_bytes,
        kv_seconds=measured.kv_seconds,
        kv_transport=measured.kv_transport,
        num_pulled_tokens=measured.num_pulled_tokens,
        pull_s=measured.pull_s,
        pull_error=measured.pull_error,
        handoff_s=measured.handoff_s,
        num_held_tokens=measured.num_held_tokens,
    )


def _decode_measured(pb: router_pb2.MeasuredRequest) -> MeasuredRequest:
    times: dict[str, Any] = {
        name: _optional_seconds(pb, name, "measured")
        for name in (
            "ttft_s",
            "total_s",
            "placed_ttft_s",
            "prefill_queue_s",
            "prefill_compute_s",
            "handoff_s",
        )
    }
    return MeasuredRequest(
        state=text(pb.state, "measured.state", MAX_NAME_CHARS, is_required=True),
        num_attempts=pb.num_attempts,
        num_prompt_tokens=pb.num_prompt_tokens,
        num_output_tokens=pb.num_output_tokens,
        queue_s=seconds(pb.queue_s, "measured.queue_s"),
        finish_reason=(
            decode_finish_reason(pb.finish_reason, "measured.finish_reason") if pb.finish_reason else None
        ),
        error_code=text(pb.error_code, "measured.error_code", MAX_NAME_CHARS),
        error_message=cut(pb.error_message),
        num_cached_tokens=pb.num_cached_tokens if pb.HasField("num_cached_tokens") else None,
        num_held_tokens=pb.num_held_tokens if pb.HasField("num_held_tokens") else None,
        kv_bytes=pb.kv_bytes,
        kv_seconds=seconds(pb.kv_seconds, "measured.kv_seconds"),
        kv_transport=text(pb.kv_transport, "measured.kv_transport", MAX_NAME_CHARS),
        num_pulled_tokens=pb.num_pulled_tokens,
        pull_s=seconds(pb.pull_s, "measured.pull_s"),
        pull_error=text(pb.pull_error, "measured.pull_error", MAX_NAME_CHARS),
        **times,
    )


def _optional_seconds(
    pb: router_pb2.Decision | router_pb2.MeasuredRequest, name: str, parent: str
) -> float | None:
    return seconds(getattr(pb, name), f"{parent}.{name}") if pb.HasField(name) else None
