"""A request's name goes through to the router's log; and a caller who leaves takes its KV along."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from openai import APITimeoutError, AsyncOpenAI, BadRequestError, ConflictError, OpenAI

from kvrelay.client import AsyncClient
from kvrelay.core.cluster_view import ClusterState
from kvrelay.core.errors import UnknownRequest
from tests.openai_proxy.running_services import RunningUp

from .conftest import SETTLE_TIMEOUT_S, greedy

ENDLESS = {"max_tokens": 4000, "extra_body": {"ignore_eos": True}}


def is_idle(state: ClusterState) -> bool:
    """Nothing runs, and both nodes hold nothing."""
    loads = [node.load for node in state.nodes]
    return not any(state.num_requests.values()) and all(
        not node.num_attempts and load and not (load.num_held_blocks or load.num_reserved or load.num_running)
        for node, load in zip(state.nodes, loads, strict=True)
    )


def is_decoding(num: int) -> Callable[[ClusterState], bool]:
    """So many requests are on a decode node."""
    return lambda state: state.num_requests.get("decoding", 0) == num


async def _wait_logged(up: RunningUp, text: str) -> None:
    async with asyncio.timeout(SETTLE_TIMEOUT_S):
        # The router is another process, so nothing here can tell when it has written.
        while text not in (up.log_dir / "router.log").read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_given_request_id_is_given_back_and_logged(
    up: RunningUp, async_client: AsyncOpenAI, model: str
) -> None:
    name = f"from-a-test-{uuid4()}"
    headers = {"x-request-id": name}
    raw = await async_client.chat.completions.with_raw_response.create(
        **greedy(model, max_tokens=2), extra_headers=headers
    )
    assert raw.headers["x-request-id"] == name
    assert raw.parse().id == f"chatcmpl-{name}"
    await _wait_logged(up, f"request={name} finished")
    streamed = f"{name}-streamed"
    stream = await async_client.responses.create(
        model=model, input="x", max_output_tokens=2, stream=True, extra_headers={"x-request-id": streamed}
    )
    assert stream.response.headers["x-request-id"] == streamed
    assert {event.response.id async for event in stream if hasattr(event, "response")} == {f"resp_{streamed}"}
    await _wait_logged(up, f"request={streamed} finished")


async def test_the_placement_of_a_completion_is_explained_by_the_id_it_was_sent_with(
    async_client: AsyncOpenAI, kvrelay_client: AsyncClient, model: str
) -> None:
    name = f"explained-{uuid4()}"
    answer = await async_client.chat.completions.create(
        **greedy(model, max_tokens=3, n=2), extra_headers={"x-request-id": name}
    )
    assert answer.usage is not None
    explanations = [await kvrelay_client.explain(one) for one in (name, f"{name}-1")]
    for explanation in explanations:
        assert (explanation.model, explanation.decision.prefill_node) == (model, "prefill-0")
        measured = explanation.measured
        assert (measured.state, measured.num_prompt_tokens) == ("done", answer.usage.prompt_tokens)
        assert measured.ttft_s is not None
        assert measured.placed_ttft_s is not None
        assert measured.placed_ttft_s <= measured.ttft_s
    total = sum(explanation.measured.num_output_tokens for explanation in explanations)
    assert total == answer.usage.completion_tokens
    with pytest.raises(UnknownRequest):
        await kvrelay_client.explain(f"{name}-2")


def test_a_request_id_is_made_where_none_is_given_and_named_in_refusals(client: OpenAI, model: str) -> None:
    first, second = (client.chat.completions.create(**greedy(model, max_tokens=1)) for _ in range(2))
    assert first._request_id
    assert first._request_id != second._request_id
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(**greedy(model, n=0), extra_headers={"x-request-id": "mine-1"})
    assert refused.value.request_id == "mine-1"


async def test_a_live_request_id_can_not_be_used_again(
    async_client: AsyncOpenAI, model: str, wait_for_state: Any
) -> None:
    headers = {"x-request-id": f"twice-{uuid4()}"}
    stream = await async_client.chat.completions.create(
        stream=True, **greedy(model, **ENDLESS), extra_headers=headers
    )
    await anext(aiter(stream))
    with pytest.raises(ConflictError):
        await async_client.chat.completions.create(**greedy(model), extra_headers=headers)
    await stream.close()
    await wait_for_state("nothing is held", is_idle)


@pytest.mark.parametrize("num_choices", [1, 3])
async def test_a_closed_stream_frees_its_kv_on_both_nodes(
    async_client: AsyncOpenAI, model: str, wait_for_state: Any, num_choices: int
) -> None:
    stream = await async_client.chat.completions.create(
        stream=True, **greedy(model, n=num_choices, **ENDLESS)
    )
    await anext(aiter(stream))
    await wait_for_state("all are under way", is_decoding(num_choices))
    await stream.close()
    await wait_for_state("nothing is held", is_idle)


async def test_a_closed_stream_of_a_response_frees_its_kv(
    async_client: AsyncOpenAI, model: str, wait_for_state: Any
) -> None:
    stream = await async_client.responses.create(
        model=model, input="Count to a million.", stream=True, temperature=0
    )
    async for event in stream:
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    await wait_for_state("nothing is held", is_idle)


async def test_a_caller_who_waits_for_one_piece_no_longer_frees_its_kv(
    async_client: AsyncOpenAI, model: str, wait_for_state: Any
) -> None:
    asking = asyncio.ensure_future(async_client.chat.completions.create(**greedy(model, **ENDLESS)))
    await wait_for_state("it is under way", is_decoding(1))
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()
    await wait_for_state("nothing is held", is_idle)


async def test_a_callers_time_limit_frees_its_kv(
    async_client: AsyncOpenAI, model: str, wait_for_state: Any
) -> None:
    with pytest.raises(APITimeoutError):
        await async_client.with_options(timeout=0.5).chat.completions.create(**greedy(model, **ENDLESS))
    await wait_for_state("nothing is held", is_idle)
