"""Every error that kvrelay reports, in one tree.

Three branches: the caller's fault (`CallerError`), operational (`OperationalError`; each says whether
it may be retried), and bugs, which are assertions and crash the process. How they look to a caller is
decided by one table per protocol: `GRPC_STATUS_NAME` here for gRPC; the proxy owns the one for HTTP.
"""

from __future__ import annotations

from typing import ClassVar, Final


class KVRelayError(Exception):
    """Base of all errors. `code` is stable and travels over the wire.

    `field` names the request field at fault, where there is one; `retry_after_s` is a hint in seconds.
    """

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


class CallerError(KVRelayError):
    """The request itself is wrong; sending it again changes nothing."""


class InvalidRequest(CallerError):
    """A field has a value that can't be served."""

    code = "INVALID_REQUEST"


class ContextLengthExceeded(CallerError):
    """Prompt plus requested output does not fit the model's context."""

    code = "CONTEXT_LENGTH_EXCEEDED"


class UnknownModel(CallerError):
    """No node of this cluster serves that model."""

    code = "UNKNOWN_MODEL"


class UnknownRequest(CallerError):
    """No request that lives, or is remembered, has that id."""

    code = "UNKNOWN_REQUEST"


class UnknownNode(CallerError):
    """No attached node has that id."""

    code = "UNKNOWN_NODE"


class DuplicateRequest(CallerError):
    """A live request has that id already."""

    code = "DUPLICATE_REQUEST"


class ConfigError(CallerError):
    """A configuration can't be used; the message lists all its faults, one a line."""

    code = "CONFIG_ERROR"


class RequestCancelled(CallerError):
    """The caller cancelled the request, or went away."""

    code = "CANCELLED"


class OperationalError(KVRelayError):
    """The cluster could not serve a sound request now."""


class DeadlineExceeded(OperationalError):
    """The request's own deadline passed."""

    code = "DEADLINE_EXCEEDED"


class NodeUnavailable(OperationalError):
    """No node that could serve the request is attached, or the one that did was lost."""

    code = "NODE_UNAVAILABLE"
    retryable = True


class RouterUnavailable(OperationalError):
    """None of the given router addresses answered."""

    code = "ROUTER_UNAVAILABLE"
    retryable = True


class Overloaded(OperationalError):
    """A bounded queue or pool is full; `retry_after_s` says when to come back."""

    code = "OVERLOADED"
    retryable = True


class TransferFailed(OperationalError):
    """A KV transfer ended without a verified whole."""

    code = "TRANSFER_FAILED"
    retryable = True


class TransferTimeout(TransferFailed):
    """A KV transfer made no progress within its deadline."""

    code = "TRANSFER_TIMEOUT"


class TransferCancelled(TransferFailed):
    """The sender of a KV transfer gave it up by its own will, and tells its router why."""

    code = "TRANSFER_CANCELLED"


class TransferCorrupt(TransferFailed):
    """A KV message failed verification: checksum, order, count, or prompt hash."""

    code = "TRANSFER_CORRUPT"


class KVLayoutMismatch(OperationalError):
    """Two nodes' KV fingerprints differ; the message shows the difference."""

    code = "KV_LAYOUT_MISMATCH"


class EngineFailed(OperationalError):
    """The engine raised while it served the request."""

    code = "ENGINE_FAILED"
    retryable = True


GRPC_STATUS_NAME: Final[dict[str, str]] = {
    "INVALID_REQUEST": "INVALID_ARGUMENT",
    "CONTEXT_LENGTH_EXCEEDED": "INVALID_ARGUMENT",
    "UNKNOWN_MODEL": "NOT_FOUND",
    "UNKNOWN_REQUEST": "NOT_FOUND",
    "UNKNOWN_NODE": "NOT_FOUND",
    "DUPLICATE_REQUEST": "ALREADY_EXISTS",
    "CONFIG_ERROR": "FAILED_PRECONDITION",
    "CANCELLED": "CANCELLED",
    "DEADLINE_EXCEEDED": "DEADLINE_EXCEEDED",
    "NODE_UNAVAILABLE": "UNAVAILABLE",
    "ROUTER_UNAVAILABLE": "UNAVAILABLE",
    "OVERLOADED": "RESOURCE_EXHAUSTED",
    "TRANSFER_FAILED": "UNAVAILABLE",
    "TRANSFER_TIMEOUT": "UNAVAILABLE",
    "TRANSFER_CANCELLED": "UNAVAILABLE",
    "TRANSFER_CORRUPT": "UNAVAILABLE",
    "KV_LAYOUT_MISMATCH": "FAILED_PRECONDITION",
    "ENGINE_FAILED": "UNAVAILABLE",
    "INTERNAL": "INTERNAL",
}
"""Error code -> name of the `grpc.StatusCode` member that carries it."""


def _all_error_types(root: type[KVRelayError]) -> list[type[KVRelayError]]:
    return [root] + [found for child in root.__subclasses__() for found in _all_error_types(child)]


_TYPE_OF_CODE: Final[dict[str, type[KVRelayError]]] = {
    error.code: error for error in reversed(_all_error_types(KVRelayError))
}


def error_from_code(
    code: str, message: str, *, field: str | None = None, retry_after_s: float | None = None
) -> KVRelayError:
    """Rebuild an error that came over the wire; an unknown code becomes the base `KVRelayError`."""
    error_type = _TYPE_OF_CODE.get(code, KVRelayError)
    return error_type(message, field=field, retry_after_s=retry_after_s)
