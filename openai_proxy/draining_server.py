"""uvicorn's server, with an end under which no request is lost that is on its way over an open connection."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

import uvicorn

from kvrelay.openai_proxy.gateway import Gateway

LINGER_S: Final = 1.0
"""How long idle connections stay open at the end, for requests on their way. Source: RFC 9112, 9.6."""
_POLL_S: Final = 0.02


class DrainingServer(uvicorn.Server):
    """First it stops to accept, and every answer closes its connection; then idle connections are closed;
    then what runs may finish. `on_stopping` is called at the beginning of that."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, on_stopping: Callable[[], None]) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._on_stopping = on_stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stopping()
        for server in self.servers:
            server.close()
        self._gateway.is_draining = True
        loop = asyncio.get_running_loop()
        until_s = loop.time() + LINGER_S
        connections = self.server_state.connections
        while connections and not self.force_exit and loop.time() < until_s:  # noqa: ASYNC110  # at the end
            await asyncio.sleep(_POLL_S)
        await super().shutdown(sockets)
