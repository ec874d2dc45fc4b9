"""One worker process: the application on an inherited listening socket, until told to stop."""

from __future__ import annotations

import logging
import signal
import socket
from types import FrameType

import uvicorn

from kvrelay.openai_proxy.access import Access
from kvrelay.openai_proxy.app import make_app
from kvrelay.openai_proxy.config import ProxyConfig
from kvrelay.openai_proxy.metrics import ProxyMetrics


def run_worker(config: ProxyConfig, access: Access, listening: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; then let what runs finish for at most `drain_timeout_s`."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    server = _Server(
        uvicorn.Config(
            make_app(config, access, ProxyMetrics()),
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            date_header=False,
            limit_concurrency=config.max_connections,
            backlog=2048,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=max(1, round(config.drain_timeout_s)),
        )
    )
    server.run(sockets=[listening])


class _Server(uvicorn.Server):
    """Returns from `run` when a signal has stopped it; uvicorn's own would then die of that signal."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
