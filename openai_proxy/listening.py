"""The socket that a proxy accepts on: inherited from the service manager, or its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Final

from kvrelay.core.errors import ConfigError
from kvrelay.openai_proxy.config import ProxyConfig

BACKLOG: Final = 2048
_FIRST_FD: Final = 3


def listen(config: ProxyConfig, environ: Mapping[str, str] = os.environ) -> socket.socket:
    """A listening socket. One that the service manager holds stays open while the proxy restarts: callers
    wait and are not turned away; `host` and `port` are its own then.

    Raises:
        ConfigError: the port can't be had, or several sockets were handed over.
    Source: sd_listen_fds(3).
    """
    if environ.get("LISTEN_PID") == str(os.getpid()):
        if environ.get("LISTEN_FDS") != "1":
            raise ConfigError(
                f"one listening socket is needed, got {environ.get('LISTEN_FDS')}", field="port"
            )
        return socket.socket(fileno=_FIRST_FD)
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        why = error.strerror or str(error)
        text = f"port {config.port} can't be listened on at {config.host}: {why}"
        raise ConfigError(text, field="port") from None
