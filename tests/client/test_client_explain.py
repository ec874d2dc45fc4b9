"""Asking about a placement through the client."""

from __future__ import annotations

from typing import Any

import pytest

from kvrelay.client import AsyncClient, Candidate, ClientConfig, Decision, Explanation, MeasuredRequest
from kvrelay.core.errors import InvalidRequest, RouterUnavailable, UnknownRequest
from kvrelay.core.ids import NodeId, RequestId
from kvrelay.core.node_messages import Role


def explanation(router_id: str, placed_ago_s: float) -> Explanation:
    candidate = Candidate(NodeId("p0"), Role.PREFILL, 3.0, (("new_tokens", 3.0),))
    decision = Decision(NodeId("p0"), NodeId("d0"), (candidate,), "least-loaded")
    measured = MeasuredRequest("decoding", 1, 3, 2, 0.0, ttft_s=0.1)
    return Explanation(RequestId("r1"), "tiny", placed_ago_s, decision, measured, router_id)


async def test_the_router_that_knows_the_request_explains_it(start_router: Any, config: ClientConfig) -> None:
    routers = [await start_router() for _ in range(3)]
    routers[1].explanations["r1"] = explanation("b", 2.0)
    async with AsyncClient([router.address for router in routers], config=config) as client:
        assert await client.explain("r1") == explanation("b", 2.0)


async def test_of_a_request_that_changed_routers_the_latest_placement_is_shown(
    start_router: Any, config: ClientConfig
) -> None:
    routers = [await start_router() for _ in range(3)]
    for router, age_s in zip(routers, (9.0, 1.0, 5.0), strict=True):
        router.explanations["r1"] = explanation(f"{age_s:g}", age_s)
    async with AsyncClient([router.address for router in routers], config=config) as client:
        assert (await client.explain("r1")).router_id == "1"


async def test_an_id_that_no_router_knows_is_an_error_with_what_each_said(
    start_router: Any, config: ClientConfig
) -> None:
    routers = [await start_router() for _ in range(2)]
    async with AsyncClient([router.address for router in routers], config=config) as client:
        with pytest.raises(UnknownRequest) as caught:
            await client.explain("r9")
    assert caught.value.field == "request_id"
    for router in routers:
        assert f"{router.address}: no r9, of 128" in caught.value.message


async def test_a_router_that_does_not_answer_might_have_known_it(
    start_router: Any, config: ClientConfig
) -> None:
    routers = [await start_router() for _ in range(2)]
    routers[0].explanations["r1"] = explanation("a", 2.0)
    await routers[1].kill()
    async with AsyncClient([router.address for router in routers], config=config) as client:
        assert (await client.explain("r1")).router_id == "a"
        with pytest.raises(RouterUnavailable):
            await client.explain("r9")


@pytest.mark.parametrize("bad", ["", "x" * 129, "a\nb", 5])
async def test_an_id_that_can_not_be_one_is_refused_before_anything_is_sent(
    client: AsyncClient, bad: Any
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await client.explain(bad)
    assert caught.value.field == "request_id"


async def test_an_answer_that_can_not_be_read_is_the_routers_fault(client: AsyncClient, router: Any) -> None:
    candidate = Candidate(NodeId("p0"), Role.PREFILL, float("inf"), ())
    decision = Decision(NodeId("p0"), NodeId("d0"), (candidate,), "odd")
    router.explanations["r1"] = Explanation(
        RequestId("r1"), "tiny", 0.0, decision, MeasuredRequest("queued", 1, 3, 2, 0.0)
    )
    with pytest.raises(RouterUnavailable, match=r"candidates\.score"):
        await client.explain("r1")
