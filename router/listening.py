"""Taking the ports that the configuration names, with an error that says which could not be had."""

from __future__ import annotations

import socket

import grpc

from kvrelay.core.errors import ConfigError


def listen_http(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConfigError: the address can't be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        raise ConfigError(_complaint("http_port", host, port, error), field="http_port") from None


def listen_grpc(server: grpc.aio.Server, host: str, port: int) -> int:
    """Have `server` listen; returns the port, which is new if `port` was 0.

    Raises:
        ConfigError: the address can't be had.
    """
    if port != 0:
        # gRPC only says "failed to bind"; a socket of our own says why.
        _probe(host, port)
    try:
        bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError as error:
        raise ConfigError(_complaint("grpc_port", host, port, error), field="grpc_port") from None
    return bound


def _probe(host: str, port: int) -> None:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        raise ConfigError(_complaint("grpc_port", host, port, error), field="grpc_port") from None


def _complaint(field: str, host: str, port: int, error: Exception) -> str:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{field} {port} can't be listened on at {host}: {why}"
