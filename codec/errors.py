"""Errors on the wire: gRPC statuses with google.rpc details, and the `Failed` of a session."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NoReturn, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from kvrelay.codec.bounds import cut
from kvrelay.core.errors import GRPC_STATUS_NAME, KVRelayError, error_from_code
from kvrelay.v1 import router_pb2

DOMAIN: Final = "kvrelay"
DETAILS_KEY: Final = "grpc-status-details-bin"
_MAX_RETRY_AFTER_S: Final = 86_400.0
_MAX_FIELD_BYTES: Final = 256

_CODE_OF_BARE_STATUS: Final = {
    grpc.StatusCode.CANCELLED: "CANCELLED",
    grpc.StatusCode.DEADLINE_EXCEEDED: "DEADLINE_EXCEEDED",
    grpc.StatusCode.INVALID_ARGUMENT: "INVALID_REQUEST",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "OVERLOADED",
    grpc.StatusCode.UNAVAILABLE: "ROUTER_UNAVAILABLE",
}
"""For statuses without our details, which gRPC itself or a middle box made."""


def to_grpc_status(error: KVRelayError) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """The status code, and the rich status to send as trailing metadata under `DETAILS_KEY`."""
    code = grpc.StatusCode[GRPC_STATUS_NAME.get(error.code, "INTERNAL")]
    details = [error_details_pb2.ErrorInfo(reason=error.code, domain=DOMAIN)]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=cut(error.field, _MAX_FIELD_BYTES), description=cut(error.message)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(min(max(error.retry_after_s, 0.0), _MAX_RETRY_AFTER_S) * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    rich = status_pb2.Status(code=code.value[0], message=cut(error.message))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        rich.details.append(packed)
    return code, rich


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: KVRelayError) -> NoReturn:
    """End the call with `error`'s status and details; always raises gRPC's own abort error."""
    code, rich = to_grpc_status(error)
    await context.abort(code, rich.message, ((DETAILS_KEY, rich.SerializeToString()),))
    raise AssertionError("abort returned")


def from_rpc_error(error: grpc.RpcError) -> KVRelayError:
    """What a failed call means: from its details where they are ours, else from its status code.

    Never raises; what can't be understood becomes the base `KVRelayError`.
    """
    found = _from_details(_details_of(error))
    if found is not None:
        return found
    code = error.code() if hasattr(error, "code") else None
    message = error.details() if hasattr(error, "details") else ""
    name = code.name if isinstance(code, grpc.StatusCode) else "no status"
    known = _CODE_OF_BARE_STATUS.get(code, "INTERNAL") if isinstance(code, grpc.StatusCode) else "INTERNAL"
    return error_from_code(known, cut(f"{message or 'no message'} ({name})"))


def _details_of(error: grpc.RpcError) -> bytes:
    found = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    metadata = cast("Iterable[tuple[str, str | bytes]]", found or ())
    for key, value in metadata:
        if key == DETAILS_KEY and isinstance(value, bytes):
            return value
    return b""


def _from_details(raw: bytes) -> KVRelayError | None:
    try:
        rich = status_pb2.Status.FromString(raw)
        code, field, retry_after_s = "", None, None
        for packed in rich.details:
            info = error_details_pb2.ErrorInfo()
            bad_request = error_details_pb2.BadRequest()
            retry = error_details_pb2.RetryInfo()
            if packed.Unpack(info) and info.domain == DOMAIN:
                code = info.reason
            elif packed.Unpack(bad_request) and bad_request.field_violations:
                field = bad_request.field_violations[0].field
            elif packed.Unpack(retry):
                retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    except DecodeError:
        return None
    if not code:
        return None
    return error_from_code(code, rich.message, field=field, retry_after_s=retry_after_s)


def encode_failed(error: KVRelayError) -> router_pb2.Failed:
    """One request's error within a session."""
    return router_pb2.Failed(
        code=error.code,
        message=cut(error.message),
        field=cut(error.field or "", _MAX_FIELD_BYTES),
        retry_after_s=error.retry_after_s,
        retryable=error.retryable,
    )


def decode_failed(pb: router_pb2.Failed) -> KVRelayError:
    """One request's error within a session; any code is taken (see `error_from_code`). Never raises."""
    retry_after_s = pb.retry_after_s if pb.HasField("retry_after_s") else None
    return error_from_code(pb.code, cut(pb.message), field=pb.field or None, retry_after_s=retry_after_s)
