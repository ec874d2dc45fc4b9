"""uvicorn's server, with an end under which no request is lost that is on its way over an open connection."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

import uvicorn

from kvrelay.openai_proxy.gateway import Gateway

LINGER_S: Final = 2.0
"""How long an idle connection stays open at the end, for a request on its way. Source: RFC 9112, 9.6."""
_POLL_S: Final = 0.02


class DrainingServer(uvicorn.Server):
    """First it stops to accept, and every answer that begins from then on closes its connection. A connection
    is closed when nothing has run over it for `LINGER_S`: one whose answer had begun before does not say that
    it ends, and its caller may have sent the next request already. What still runs after `drain_timeout_s` is
    uvicorn's to end. `on_stopping` is called at the beginning of all that."""

    def __init__(
        self,
        config: uvicorn.Config,
        gateway: Gateway,
        drain_timeout_s: float,
        on_stopping: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._drain_timeout_s = drain_timeout_s
        self._on_stopping = on_stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stopping()
        for server in self.servers:
            server.close()
        self._gateway.is_draining = True
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._drain_timeout_s
        idle_since_s: dict[object, float] = {}
        while self.server_state.connections and not self.force_exit and loop.time() < until_s:
            self._close_idle(idle_since_s, loop.time())
            await asyncio.sleep(_POLL_S)
        await super().shutdown(sockets)

    def _close_idle(self, idle_since_s: dict[object, float], now_s: float) -> None:
        for connection in list(self.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if cycle is not None and not cycle.response_complete:
                idle_since_s.pop(connection, None)
            elif now_s - idle_since_s.setdefault(connection, now_s) >= LINGER_S:
                connection.shutdown()
