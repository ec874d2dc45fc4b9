"""Which transport a node uses, and why."""

from __future__ import annotations

from dataclasses import dataclass

from kvrelay.core.errors import ConfigError
from kvrelay.core.kv import DeviceKind
from kvrelay.kv_transfer.memory import MemoryTransport
from kvrelay.kv_transfer.tcp import TCPTransport
from kvrelay.kv_transfer.transport import KVTransport, TransportContext
from kvrelay.kv_transfer.ucx import UCXTransport


@dataclass(frozen=True, slots=True)
class ChosenTransport:
    """`note` is for people: the transport's name and the reason."""

    transport: KVTransport
    note: str


def choose_transport(choice: str, context: TransportContext) -> ChosenTransport:
    """Make the transport that `choice` names (see `KVTransferConfig.transport`).

    Raises:
        ConfigError: it can't be had here.
    """
    if choice == "memory":
        return ChosenTransport(MemoryTransport(context), "memory: configured")
    if choice == "tcp":
        return ChosenTransport(TCPTransport(context), "tcp: configured")
    if choice == "ucx":
        ucx = UCXTransport(context)
        return ChosenTransport(ucx, f"ucx: configured ({ucx.lanes})")
    try:
        ucx = UCXTransport(context)
    except ConfigError as error:
        if context.receive_staging.device_kind is not DeviceKind.CPU:
            raise ConfigError(
                f"KV in the memory of a GPU moves by ucx alone, which is not to be had: {error.message}"
            ) from error
        return ChosenTransport(TCPTransport(context), f"tcp: ucx is not to be had ({error.message})")
    return ChosenTransport(ucx, f"ucx: NIXL works here ({ucx.lanes})")
