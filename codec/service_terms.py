"""Priority, tenant and time-outs of a request on the wire."""

from __future__ import annotations

from typing import Final

from kvrelay.codec.bounds import seconds, text
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.service_terms import DEFAULT_TERMS, MAX_TENANT_CHARS, Priority, ServiceTerms
from kvrelay.v1 import router_pb2

MAX_TIMEOUT_S: Final = 86_400.0

_TO_WIRE: Final = {
    Priority.LOW: router_pb2.PRIORITY_LOW,
    Priority.NORMAL: router_pb2.PRIORITY_UNSPECIFIED,
    Priority.HIGH: router_pb2.PRIORITY_HIGH,
}
_FROM_WIRE: Final[dict[int, Priority]] = {
    **{wire: priority for priority, wire in _TO_WIRE.items()},
    router_pb2.PRIORITY_NORMAL: Priority.NORMAL,
}


def encode_priority(priority: Priority) -> router_pb2.Priority:
    """The usual one is left out of messages."""
    return _TO_WIRE[priority]


def decode_terms(pb: router_pb2.GenerateRequest) -> ServiceTerms:
    """On which terms a call asks to be served.

    Raises:
        InvalidRequest: a field is out of range.
    """
    priority = decode_priority(pb.priority, "priority")
    tenant = text(pb.tenant, "tenant", MAX_TENANT_CHARS)
    if not pb.HasField("ttft_timeout_s"):
        plain = not tenant and priority is Priority.NORMAL
        return DEFAULT_TERMS if plain else ServiceTerms(priority, tenant)
    return ServiceTerms(priority, tenant, decode_timeout(pb.ttft_timeout_s, "ttft_timeout_s"))


def decode_priority(value: int, field: str) -> Priority:
    """Raises `InvalidRequest`, naming `field`."""
    priority = _FROM_WIRE.get(value)
    if priority is None:
        raise InvalidRequest(f"{field} {value} is none of the enum Priority", field=field)
    return priority


def decode_timeout(timeout_s: float, field: str) -> float:
    """Seconds above 0, at most a day. Raises `InvalidRequest`, naming `field`."""
    seconds(timeout_s, field, is_positive=True)
    if timeout_s > MAX_TIMEOUT_S:
        raise InvalidRequest(f"{field} must be at most {MAX_TIMEOUT_S:g}, got {timeout_s:g}", field=field)
    return timeout_s
