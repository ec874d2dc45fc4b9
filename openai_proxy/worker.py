"""One worker process: the application on an inherited listening socket, until told to stop."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn

from kvrelay.openai_proxy.access import Access
from kvrelay.openai_proxy.app import Companion, make_app
from kvrelay.openai_proxy.config import ProxyConfig
from kvrelay.openai_proxy.draining_server import DrainingServer
from kvrelay.openai_proxy.listening import BACKLOG
from kvrelay.openai_proxy.metrics import ProxyMetrics


def run_worker(
    config: ProxyConfig,
    access: Access,
    listening: socket.socket,
    companion: Companion | None = None,
    on_stopping: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT; then let what runs finish for at most `drain_timeout_s`.

    `companion` runs beside the application, `on_stopping` is called when the end begins.
    """
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    app = make_app(config, access, ProxyMetrics(), companion)
    server = DrainingServer(
        uvicorn.Config(
            app,
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            date_header=False,
            limit_concurrency=config.max_connections,
            backlog=BACKLOG,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,  # after the drain
        ),
        app,
        config.drain_timeout_s,
        on_stopping,
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
