"""Where control connections come from: the host's TCP, or another network of the same kind."""

from __future__ import annotations

import socket
from typing import Protocol

from kvrelay.core.errors import ConfigError
from kvrelay.kv_transfer.tcp_streams import dial


class Sockets(Protocol):
    """Makes non-blocking sockets, which a `Watcher` can watch."""

    def dial(self, host: str, port: int) -> socket.socket:
        """One that connects to an IP address.

        Raises:
            OSError: it can't even begin to.
        """
        ...

    def listen(self, host: str, port: int) -> socket.socket:
        """One that accepts connections.

        Raises:
            ConfigError: the address can't be had.
        """
        ...


class HostSockets:
    """The host's own."""

    def dial(self, host: str, port: int) -> socket.socket:
        """See `Sockets`."""
        return dial(host, port)

    def listen(self, host: str, port: int) -> socket.socket:
        """See `Sockets`."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            raise ConfigError(f"can't listen on {host}:{port} for KV transfer: {error}") from error
        listener.setblocking(False)
        return listener
