"""One worker process: the application on an inherited listening socket, until told to stop."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys

import uvicorn

from kvrelay.openai_proxy.access import Access
from kvrelay.openai_proxy.app import make_app
from kvrelay.openai_proxy.config import ProxyConfig
from kvrelay.openai_proxy.metrics import ProxyMetrics


def run_worker(config: ProxyConfig, access: Access, listening: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; then let what runs finish for at most `drain_timeout_s`."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    server = uvicorn.Server(
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

    def on_signal(number: int, frame: object) -> None:
        """Before the server has its own handlers, and again once it is done: it repeats what it was sent."""
        if not server.started:
            sys.exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    # What has been loaded stays: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    server.run(sockets=[listening])
