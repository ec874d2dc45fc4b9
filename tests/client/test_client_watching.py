"""Looking at the cluster through the client."""

from __future__ import annotations

from typing import Any

from kvrelay.client import AsyncClient, ClientConfig
from kvrelay.core.cluster_view import ClusterState
from kvrelay.core.errors import NodeUnavailable


async def test_states_come_as_the_router_sends_them(client: AsyncClient, router: Any) -> None:
    router.states = [ClusterState(router_id=name, counters={"requests": 3}) for name in ("a", "b")]
    seen = []
    async for state in client.watch_cluster(0.5):
        seen.append((state.router_id, state.counters["requests"]))
        if len(seen) == 2:
            break
    assert seen == [("a", 3), ("b", 3)]
    assert (await client.cluster_state()).router_id == "a"


async def test_the_watch_goes_on_through_another_router(start_router: Any, config: ClientConfig) -> None:
    routers = {name: await start_router() for name in ("a", "b")}
    for name, router in routers.items():
        router.states = [ClusterState(router_id=name)]
    async with AsyncClient([router.address for router in routers.values()], config=config) as client:
        watch = client.watch_cluster()
        first = (await anext(watch)).router_id
        await routers[first].kill()
        assert (await anext(watch)).router_id == ({"a", "b"} - {first}).pop()
        await watch.aclose()


async def test_a_refused_watch_is_tried_again(client: AsyncClient, router: Any) -> None:
    router.unary_errors = [NodeUnavailable("not yet")]
    watch = client.watch_cluster()
    assert (await anext(watch)).router_id == "fake"
    await watch.aclose()


async def test_models_are_believed_for_a_while(router: Any, config: ClientConfig) -> None:
    async with AsyncClient(router.address, config=config) as client:
        for _ in range(3):
            await client.complete([1])
    assert router.num_model_requests == 1
