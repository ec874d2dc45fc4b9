"""Which of this host's addresses peers push KV to, where the configuration leaves it open.

A node must be reachable for the other nodes of its routers. The address that it reaches a router from is one
that the router's network knows, and needs no setting: 127.0.0.1 where all routers are on this host.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import replace
from ipaddress import ip_address
from typing import Final

from kvrelay.node.config import NodeConfig
from kvrelay.node.sd_notify import Notifier

logger = logging.getLogger(__name__)

RETRY_S: Final = 1.0
_EXTENSION_S: Final = 60.0


async def with_transfer_host(config: NodeConfig, notifier: Notifier) -> NodeConfig:
    """`config` with `transfer.listen_host` filled in, if it is empty. Waits until the way to a router is
    known: right after a boot there may be no network."""
    if config.transfer.listen_host:
        return config
    status = f"no way to a router yet: {', '.join(config.routers)}"
    has_said = False
    while (host := await find_transfer_host(config.routers)) is None:
        if not has_said:
            logger.warning("%s", status)
        has_said = True
        notifier.extend(status, _EXTENSION_S)
        await asyncio.sleep(RETRY_S)
    logger.info("transfer.listen_host=%s: this host's address on the way to its routers", host)
    return replace(config, transfer=replace(config.transfer, listen_host=host))


async def find_transfer_host(routers: tuple[str, ...]) -> str | None:
    """This host's address on the way to the first router that is on another host, else the loopback address;
    None: no router's name can be resolved, or none has a route. Sends nothing to them."""
    found = [host for router in routers if (host := await _local_address(router)) is not None]
    distant = (host for host in found if not ip_address(host).is_loopback)
    return next(distant, found[0] if found else None)


async def _local_address(router: str) -> str | None:
    host, _, port = router.rpartition(":")
    try:
        resolved = await asyncio.get_running_loop().getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_DGRAM
        )
        family, kind, protocol, _, address = resolved[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of a datagram socket: only looks up the route
            return str(probe.getsockname()[0])
    except OSError:
        return None
