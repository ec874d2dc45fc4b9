"""A node's reports: one encoder and one decoder per kind, found by table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

from kvrelay.codec.bounds import cut, seconds, text
from kvrelay.codec.sampling import decode_finish_reason, encode_finish_reason
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.ids import AttemptId
from kvrelay.core.node_messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptRefused,
    DrainStarted,
    HandoffVerified,
    KVReleased,
    PrefillFinished,
    Report,
    Reserved,
)
from kvrelay.v1 import cluster_pb2

MAX_CODE_CHARS: Final = 64
MAX_TRANSPORT_CHARS: Final = 64
MAX_FIELD_CHARS: Final = 256


def encode_report(report: Report) -> cluster_pb2.Report:
    """One report."""
    match report:
        case Reserved():
            return cluster_pb2.Report(
                attempt=report.attempt,
                reserved=cluster_pb2.Reserved(num_cached_tokens=report.num_cached_tokens),
            )
        case PrefillFinished():
            finished = cluster_pb2.PrefillFinished(
                num_cached_tokens=report.num_cached_tokens,
                queue_s=report.queue_s,
                compute_s=report.compute_s,
                num_pulled_tokens=report.num_pulled_tokens,
                pull_s=report.pull_s,
                pull_error=report.pull_error,
            )
            return cluster_pb2.Report(attempt=report.attempt, prefill_finished=finished)
        case HandoffVerified():
            verified = cluster_pb2.HandoffVerified(
                num_bytes=report.num_bytes,
                num_messages=report.num_messages,
                seconds=report.seconds,
                transport=report.transport,
            )
            return cluster_pb2.Report(attempt=report.attempt, handoff_verified=verified)
        case _:
            return _encode_terminal(report)


def _encode_terminal(
    report: AttemptRefused | AttemptFinished | AttemptFailed | KVReleased | DrainStarted,
) -> cluster_pb2.Report:
    match report:
        case AttemptRefused(attempt, code, message, field):
            refused = cluster_pb2.AttemptRefused(code=code, message=cut(message), field=field)
            return cluster_pb2.Report(attempt=attempt, attempt_refused=refused)
        case AttemptFinished(attempt, reason):
            finished = cluster_pb2.AttemptFinished(finish_reason=encode_finish_reason(reason))
            return cluster_pb2.Report(attempt=attempt, attempt_finished=finished)
        case AttemptFailed(attempt, code, message, field):
            failed = cluster_pb2.AttemptFailed(code=code, message=cut(message), field=field)
            return cluster_pb2.Report(attempt=attempt, attempt_failed=failed)
        case KVReleased(attempt):
            return cluster_pb2.Report(attempt=attempt, kv_released=cluster_pb2.KVReleased())
        case DrainStarted():
            return cluster_pb2.Report(drain_started=cluster_pb2.DrainStarted())


def decode_report(pb: cluster_pb2.Report) -> Report:
    """One report.

    Raises:
        InvalidRequest: it has no kind that this version knows, or a field is out of range.
    """
    kind = pb.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest("reports.kind is missing or unknown", field="reports.kind")
    if pb.attempt == 0 and kind != "drain_started":
        raise InvalidRequest(f"reports.attempt of {kind} must be at least 1", field="reports.attempt")
    return _DECODERS[kind](AttemptId(pb.attempt), getattr(pb, kind))


def _prefill_finished(attempt: AttemptId, pb: cluster_pb2.PrefillFinished) -> Report:
    return PrefillFinished(
        attempt,
        num_cached_tokens=pb.num_cached_tokens,
        queue_s=seconds(pb.queue_s, "reports.prefill_finished.queue_s"),
        compute_s=seconds(pb.compute_s, "reports.prefill_finished.compute_s"),
        num_pulled_tokens=pb.num_pulled_tokens,
        pull_s=seconds(pb.pull_s, "reports.prefill_finished.pull_s"),
        pull_error=text(pb.pull_error, "reports.prefill_finished.pull_error", MAX_CODE_CHARS),
    )


def _handoff_verified(attempt: AttemptId, pb: cluster_pb2.HandoffVerified) -> Report:
    return HandoffVerified(
        attempt,
        num_bytes=pb.num_bytes,
        num_messages=pb.num_messages,
        seconds=seconds(pb.seconds, "reports.handoff_verified.seconds"),
        transport=text(pb.transport, "reports.handoff_verified.transport", MAX_TRANSPORT_CHARS),
    )


def _code(pb: cluster_pb2.AttemptRefused | cluster_pb2.AttemptFailed, kind: str) -> str:
    return text(pb.code, f"reports.{kind}.code", MAX_CODE_CHARS, is_required=True)


def _field(pb: cluster_pb2.AttemptRefused | cluster_pb2.AttemptFailed, kind: str) -> str:
    return text(pb.field, f"reports.{kind}.field", MAX_FIELD_CHARS)


def _attempt_refused(attempt: AttemptId, pb: cluster_pb2.AttemptRefused) -> Report:
    kind = "attempt_refused"
    return AttemptRefused(attempt, _code(pb, kind), cut(pb.message), _field(pb, kind))


def _attempt_failed(attempt: AttemptId, pb: cluster_pb2.AttemptFailed) -> Report:
    kind = "attempt_failed"
    return AttemptFailed(attempt, _code(pb, kind), cut(pb.message), _field(pb, kind))


_DECODERS: Final[dict[str, Callable[[AttemptId, Any], Report]]] = {
    "reserved": lambda attempt, pb: Reserved(attempt, cast(int, pb.num_cached_tokens)),
    "prefill_finished": _prefill_finished,
    "handoff_verified": _handoff_verified,
    "attempt_refused": _attempt_refused,
    "attempt_finished": lambda attempt, pb: AttemptFinished(
        attempt, decode_finish_reason(pb.finish_reason, "reports.attempt_finished.finish_reason")
    ),
    "attempt_failed": _attempt_failed,
    "kv_released": lambda attempt, pb: KVReleased(attempt),
    "drain_started": lambda attempt, pb: DrainStarted(),
}
