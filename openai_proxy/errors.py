"""Errors as OpenAI clients know them: ``{"error": {message, type, param, code}}`` with the right status."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvrelay.core.errors import KVRelayError

HTTP_STATUS: Final[dict[str, int]] = {
    "INVALID_REQUEST": 400,
    "CONTEXT_LENGTH_EXCEEDED": 400,
    "UNKNOWN_MODEL": 404,
    "UNKNOWN_REQUEST": 404,
    "UNKNOWN_NODE": 404,
    "DUPLICATE_REQUEST": 409,
    "CONFIG_ERROR": 500,
    "CANCELLED": 499,
    "DEADLINE_EXCEEDED": 504,
    "NODE_UNAVAILABLE": 503,
    "ROUTER_UNAVAILABLE": 503,
    "OVERLOADED": 429,
    "TRANSFER_FAILED": 503,
    "TRANSFER_TIMEOUT": 503,
    "TRANSFER_CANCELLED": 503,
    "TRANSFER_CORRUPT": 503,
    "KV_LAYOUT_MISMATCH": 503,
    "ENGINE_FAILED": 503,
    "INTERNAL": 500,
}
"""kvrelay's error code -> HTTP status; its counterpart for gRPC is `GRPC_STATUS_NAME`."""

_OPENAI_CODE: Final = {
    "CONTEXT_LENGTH_EXCEEDED": "context_length_exceeded",
    "UNKNOWN_MODEL": "model_not_found",
    "OVERLOADED": "rate_limit_exceeded",
}
_PARAM_OF_FIELD: Final = {
    "prompt_token_ids": "prompt",
    "sampling.num_logprobs": "top_logprobs",
}
DEFAULT_RETRY_AFTER_S: Final = 1.0
MAX_SHOWN_CHARS: Final = 100
"""Of a field's name that nobody knows."""
_FIELD_NAME: Final = re.compile(r"[a-z_][a-z0-9_]*")
_NOT_FIELDS: Final = frozenset({"body", "str", "int", "float", "bool", "dict", "list"})
"""What pydantic puts into a path for the body itself and for the members of a union."""


@dataclass(slots=True, eq=False)
class ApiError(Exception):
    """An answer that is an error. `retry_after_s` becomes the ``Retry-After`` header, in whole seconds.

    Not frozen: Starlette takes a handled exception's traceback off, and could not.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def type(self) -> str:
        """OpenAI's class of error."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, Any]:
        """The JSON object, for an answer or for an event within a stream."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """``Retry-After`` where coming back helps."""
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}


def bad_request(message: str, param: str | None, code: str | None = None) -> ApiError:
    """The caller's fault, in one field."""
    return ApiError(400, message, param, code)


def unsupported(param: str, what: str = "is not supported by this server") -> ApiError:
    """A field that OpenAI knows and kvrelay does not do: refused by name, never ignored."""
    return ApiError(400, f"{param} {what}", param, "unsupported_parameter")


def from_kvrelay(error: KVRelayError, params: Mapping[str, str] | None = None) -> ApiError:
    """What a cluster's error is to an OpenAI client. `params` maps kvrelay's field names to the caller's."""
    status = HTTP_STATUS.get(error.code, 500)
    retry_after_s = error.retry_after_s
    if status in (429, 503) and retry_after_s is None:
        retry_after_s = DEFAULT_RETRY_AFTER_S
    code = _OPENAI_CODE.get(error.code, error.code.lower())
    param = _param(error.field, params or {})
    message = error.message.replace(error.field, param) if error.field and param else error.message
    return ApiError(status, message, param, code, retry_after_s)


def _param(field: str | None, params: Mapping[str, str]) -> str | None:
    if field is None:
        return None
    known = params.get(field) or _PARAM_OF_FIELD.get(field)
    return known or field.removeprefix("sampling.")


def from_validation(faults: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's faults, with the field's path as OpenAI writes it: ``messages[0].role``.

    Where a field may be one of several things, the one that was understood furthest is meant.
    """
    same_field = [fault for fault in faults if fault.get("loc", ())[:2] == faults[0].get("loc", ())[:2]]
    fault = max(same_field, key=lambda fault: len(fault.get("loc", ())))
    param = _path(fault.get("loc", ()))
    kind = fault.get("type", "")
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {fault.get('ctx', {}).get('error', '')}", None)
    if kind == "extra_forbidden":
        *outer, name = fault["loc"]
        return unsupported(".".join(filter(None, (_path(outer), str(name)[:MAX_SHOWN_CHARS]))))
    message = str(fault.get("msg", "is invalid"))
    if kind == "fault":  # a check of several fields names the one at fault itself
        inner = fault["ctx"]["param"]
        param = f"{param}.{inner}" if param and param != inner else inner
        return bad_request(f"{param} {fault['ctx']['text']}", param)
    return bad_request(f"{param}: {message}" if param else message, param or None)


def _path(location: Sequence[object]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif isinstance(part, str) and _FIELD_NAME.fullmatch(part) and part not in _NOT_FIELDS:
            path += f".{part}" if path else part
    return path
