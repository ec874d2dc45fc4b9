"""Having a node leave, through the client."""

from __future__ import annotations

from typing import Any

import pytest

from kvrelay.client import AsyncClient, ClientConfig
from kvrelay.core.errors import InvalidRequest, RouterUnavailable, UnknownNode


async def test_every_router_that_has_the_node_passes_the_word_on(
    start_router: Any, config: ClientConfig
) -> None:
    routers = [await start_router() for _ in range(3)]
    for router in routers[1:]:
        router.node_ids = ["p0"]
    async with AsyncClient([router.address for router in routers], config=config) as client:
        await client.drain_node("p0")
    assert [router.drained_ids for router in routers] == [[], ["p0"], ["p0"]]


async def test_a_node_that_no_router_has_is_unknown(start_router: Any, config: ClientConfig) -> None:
    routers = [await start_router() for _ in range(2)]
    async with AsyncClient([router.address for router in routers], config=config) as client:
        with pytest.raises(UnknownNode) as caught:
            await client.drain_node("p9")
    assert caught.value.field == "node_id"


async def test_where_a_router_does_not_answer_the_node_is_not_called_unknown(
    start_router: Any, config: ClientConfig
) -> None:
    router = await start_router()
    async with AsyncClient([router.address, "127.0.0.1:1"], config=config) as client:
        with pytest.raises(RouterUnavailable):
            await client.drain_node("p9")


@pytest.mark.parametrize("node_id", ["", 7], ids=["empty", "no string"])
async def test_an_id_that_is_none_is_refused(start_router: Any, config: ClientConfig, node_id: Any) -> None:
    router = await start_router()
    async with AsyncClient([router.address], config=config) as client:
        with pytest.raises(InvalidRequest) as caught:
            await client.drain_node(node_id)
    assert caught.value.field == "node_id"
