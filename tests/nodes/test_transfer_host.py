"""Where peers push KV to, when nobody said: the address on the way to the routers."""

from __future__ import annotations

import asyncio
import socket

import pytest

from kvrelay.core.node_messages import Role
from kvrelay.engine.config import EngineConfig, EngineKind
from kvrelay.kv_transfer.config import KVTransferConfig
from kvrelay.node import transfer_host
from kvrelay.node.config import NodeConfig
from kvrelay.node.sd_notify import Notifier
from kvrelay.node.transfer_host import find_transfer_host, with_transfer_host

OTHER_HOST = "192.0.2.7:7070"
"""An address that is nobody's. Source: RFC 5737."""


def config(*routers: str, listen_host: str = "") -> NodeConfig:
    engine = EngineConfig("sim", EngineKind.SIM, num_blocks=8)
    return NodeConfig(Role.DECODE, engine, routers, KVTransferConfig(listen_host=listen_host))


@pytest.fixture
def routes(monkeypatch) -> dict[str, str]:
    """Router -> this host's address on the way to it; a router that is absent can't be resolved."""
    known: dict[str, str] = {}

    async def local_address(router: str) -> str | None:
        return known.get(router)

    monkeypatch.setattr(transfer_host, "_local_address", local_address)
    monkeypatch.setattr(transfer_host, "RETRY_S", 0.0)
    return known


async def test_routers_of_this_host_are_reached_from_the_loopback_address() -> None:
    assert await find_transfer_host(("127.0.0.1:7070",)) == "127.0.0.1"


async def test_a_name_that_nobody_knows_gives_none() -> None:
    assert await find_transfer_host(("router.invalid:7070",)) is None


async def test_a_router_on_another_host_decides(routes) -> None:
    routes.update({"127.0.0.1:7070": "127.0.0.1", OTHER_HOST: "198.51.100.2"})
    assert await find_transfer_host(("127.0.0.1:7070", OTHER_HOST)) == "198.51.100.2"
    assert await find_transfer_host((OTHER_HOST, "127.0.0.1:7070")) == "198.51.100.2"


async def test_the_first_router_that_can_be_resolved_decides(routes) -> None:
    routes["b:7070"] = "198.51.100.3"
    assert await find_transfer_host(("a:7070", "b:7070")) == "198.51.100.3"


async def test_what_is_configured_stays() -> None:
    given = config(OTHER_HOST, listen_host="198.51.100.9")
    assert await with_transfer_host(given, Notifier()) is given


async def test_a_node_waits_until_there_is_a_way_to_a_router(routes) -> None:
    waiting = asyncio.create_task(with_transfer_host(config(OTHER_HOST), Notifier()))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done()
    routes[OTHER_HOST] = "198.51.100.2"
    assert (await waiting).transfer.listen_host == "198.51.100.2"


def test_the_real_look_up_opens_no_connection() -> None:
    """UDP's `connect` needs nobody at the other end; TCP's would."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert asyncio.run(find_transfer_host((address,))) == "127.0.0.1"
        taken.setblocking(False)
        with pytest.raises(BlockingIOError):
            taken.recv(1)
