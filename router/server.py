"""A whole router in one event loop: gRPC and HTTP servers around one shell."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Callable
from random import SystemRandom
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvrelay.core.clock import Clock
from kvrelay.core.errors import NodeUnavailable
from kvrelay.router.attach_service import SERVICE_NAME as CLUSTER_SERVICE
from kvrelay.router.attach_service import AttachService
from kvrelay.router.core import RouterCore
from kvrelay.router.drain_service import DrainService
from kvrelay.router.generate_service import GenerateService
from kvrelay.router.http_server import HttpServer, make_app
from kvrelay.router.info_service import InfoService
from kvrelay.router.kv_intake import KVIntake
from kvrelay.router.listening import listen_grpc, listen_http
from kvrelay.router.metrics import RouterMetrics
from kvrelay.router.policies import make_policy
from kvrelay.router.router_service import SERVICE_NAME as ROUTER_SERVICE
from kvrelay.router.router_service import register_router
from kvrelay.router.server_config import RouterConfig
from kvrelay.router.shell import RouterShell
from kvrelay.router.state_report import can_serve

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES: Final = 64 << 20
SERVER_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Two routers on one port would share its connections at random.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # What ends a connection when no answer comes; a minute unless given, whatever stands above.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
SETTLE_TIMEOUT_S: Final = 2.0
CLOSE_TIMEOUT_S: Final = 10.0
"""More than all that follows a drain takes: releases, open streams, the HTTP server."""
_POLL_S: Final = 0.02


class RouterServer:
    """`start`, then serve until `stop`. One per event loop."""

    def __init__(self, config: RouterConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._metrics = RouterMetrics()
        epoch = secrets.randbits(62) + 1
        kv = KVIntake(config.core)
        policy = make_policy(config.core.placement, kv.index)
        core = RouterCore(config.core, epoch, policy, SystemRandom(), kv)
        self.shell = RouterShell(config, core, clock, self._metrics)
        self.grpc_port = 0
        self.http_port = 0
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # set at run time
        self._http: HttpServer | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._grpc = grpc.aio.server(options=SERVER_OPTIONS)

    async def start(self) -> None:
        """Take the ports and serve.

        Raises:
            ConfigError: a port can't be had.
        """
        config = self._config
        listening = listen_http(config.listen_host, config.http_port)
        try:
            self.grpc_port = listen_grpc(self._grpc, config.listen_host, config.grpc_port)
        except BaseException:
            listening.close()
            raise
        self.http_port = listening.getsockname()[1]
        self._http = self._register_services(listening)
        await self._grpc.start()
        self._http.start()
        self._ticker = asyncio.create_task(self.shell.run_ticker(), name="ticker")
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def _register_services(self, listening: socket.socket) -> HttpServer:
        shell = self.shell
        router_id = self._config.router_id or f"{socket.gethostname()}:{self.grpc_port}"
        info = InfoService(shell, router_id)
        register_router(self._grpc, GenerateService(shell), info, DrainService(shell.attachments))
        AttachService(shell, router_id).register(self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (ROUTER_SERVICE, CLUSTER_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)
        self._metrics.watch(info.state)
        app = make_app(
            self._metrics.exposition,
            info.state,
            is_serving=lambda: not shell.is_draining,
            is_ready=lambda: can_serve(shell.status()),
        )
        return HttpServer(app, listening)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", ROUTER_SERVICE, CLUSTER_SERVICE):
            await self._health.set(name, status)

    def describe(self) -> str:
        """What the router does, in a few words."""
        num_nodes, num_live = len(self.shell.attachments.by_node), len(self.shell.sessions.session_of)
        return (
            f"{'draining' if self.shell.is_draining else 'serving'}: {num_nodes} nodes, {num_live} requests"
        )

    async def stop(self, drain_timeout_s: float) -> None:
        """Take no new requests, let the running ones finish for at most `drain_timeout_s`, then close."""
        self.shell.is_draining = True
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        live = self.shell.sessions.session_of
        await self._wait_until(lambda: not live, drain_timeout_s)
        if live:
            logger.warning("drain timed out live_requests=%d", len(live))
        self.shell.abandon_sessions()
        # The nodes are given time to acknowledge their releases; their leases see to the rest.
        await self._wait_until(lambda: not self.shell.status().num_unsettled_attempts, SETTLE_TIMEOUT_S)
        for attachment in self.shell.attachments.by_node.values():
            attachment.end(NodeUnavailable("this router is shutting down"))
        await self._grpc.stop(grace=0.5)
        if self._http is not None:
            await self._http.stop()
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)

    async def _wait_until(self, is_over: Callable[[], bool], timeout_s: float) -> None:
        deadline_s = self._clock.now_s() + timeout_s
        while not is_over() and self._clock.now_s() < deadline_s:  # noqa: ASYNC110  # only at the very end
            await asyncio.sleep(_POLL_S)
