"""gRPC method handlers that answer malformed bytes and kvrelay's errors in the caller's protocol.

gRPC's own handlers end a call whose message can't be parsed with a bare INTERNAL status. Here such a
message arrives as a `Malformed`, which the service refuses with an error of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message

from kvrelay.codec.errors import abort_with
from kvrelay.core.errors import InvalidRequest, KVRelayError

M = TypeVar("M", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]
UnaryBehaviour = Callable[[Any, Context], Awaitable[Any]]
StreamBehaviour = Callable[[Context], Awaitable[None]]
END_OF_STREAM: Final[object] = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in the stubs


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are no message of this kind."""

    message_name: str

    def error(self) -> InvalidRequest:
        return InvalidRequest(
            f"the message is no valid protobuf {self.message_name}", field=self.message_name
        )


def parser(message_type: type[M]) -> Callable[[bytes], M | Malformed]:
    """A deserializer that never raises."""
    from_string = message_type.FromString
    malformed = Malformed(message_type.DESCRIPTOR.name)

    def parse(raw: bytes) -> M | Malformed:
        try:
            return from_string(raw)
        except DecodeError:
            return malformed

    return parse


async def read_message(context: Context) -> Any:
    """The next message of a request stream; None at its end.

    Raises:
        InvalidRequest: it can't be parsed.
    """
    received = await context.read()
    if received is END_OF_STREAM:
        return None
    if isinstance(received, Malformed):
        raise received.error()
    return received


def unary(behaviour: UnaryBehaviour, request_type: type[Message]) -> grpc.RpcMethodHandler[Any, Any]:
    """One request, one response."""

    async def handle(request: Any, context: Context) -> Any:
        try:
            return await behaviour(checked(request), context)
        except KVRelayError as error:
            await abort_with(context, error)

    return _handler(grpc.unary_unary_rpc_method_handler, handle, request_type)


def server_stream(behaviour: UnaryBehaviour, request_type: type[Message]) -> grpc.RpcMethodHandler[Any, Any]:
    """One request; the behaviour writes the responses."""

    async def handle(request: Any, context: Context) -> None:
        try:
            await behaviour(checked(request), context)
        except KVRelayError as error:
            await abort_with(context, error)

    return _handler(grpc.unary_stream_rpc_method_handler, handle, request_type)


def both_streams(behaviour: StreamBehaviour, request_type: type[Message]) -> grpc.RpcMethodHandler[Any, Any]:
    """The behaviour reads (by `read_message`) and writes."""

    async def handle(_requests: Any, context: Context) -> None:
        try:
            await behaviour(context)
        except KVRelayError as error:
            await abort_with(context, error)

    return _handler(grpc.stream_stream_rpc_method_handler, handle, request_type)


def checked(request: M | Malformed) -> M:
    """Raises InvalidRequest for bytes that could not be parsed."""
    if isinstance(request, Malformed):
        raise request.error()
    return request


def _handler(
    make: Callable[..., Any], behaviour: Callable[..., Awaitable[Any]], request_type: type[Message]
) -> grpc.RpcMethodHandler[Any, Any]:
    made = make(
        behaviour,
        request_deserializer=parser(request_type),
        response_serializer=_serialize,
    )
    return cast("grpc.RpcMethodHandler[Any, Any]", made)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def register(
    server: grpc.aio.Server, service: str, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]
) -> None:
    """Serve `handlers`, by method name, as `service`."""
    generic: Sequence[Any] = (grpc.method_handlers_generic_handler(service, handlers),)
    server.add_generic_rpc_handlers(generic)
