"""Requests and their answers through one router."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvrelay.client import AsyncClient, ClientConfig, FinishReason, SamplingParams, TokenLogprobs
from kvrelay.core.errors import KVRelayError, Overloaded


async def test_tokens_stream_with_their_indices_and_the_result_has_all(
    client: AsyncClient, router: Any, answer: Any
) -> None:
    stream = client.generate([1, 2, 3], sampling=SamplingParams(max_tokens=8), request_id="r1")
    chunks = [chunk async for chunk in stream]
    position = 0
    for chunk in chunks:
        assert chunk.index == position
        position += len(chunk.token_ids)
    result = stream.result
    assert result.token_ids == answer([1, 2, 3], 8) == stream.token_ids
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == result.token_ids
    assert (result.finish_reason, result.request_id, result.router) == (
        FinishReason.LENGTH,
        "r1",
        router.address,
    )
    assert result.report.prefill_node == "p0"
    assert result.text == ""
    assert (result.num_retries, result.num_continuations) == (0, 0)
    assert len(result.itl_s) == 7
    assert min(result.itl_s) >= 0
    assert 0 < result.ttft_s <= result.total_s


async def test_many_requests_share_one_session(client: AsyncClient, router: Any, answer: Any) -> None:
    prompts = [[number, number + 1] for number in range(64)]
    results = await asyncio.gather(
        *(client.complete(prompt, sampling=SamplingParams(max_tokens=5 + prompt[0])) for prompt in prompts)
    )
    for prompt, result in zip(prompts, results, strict=True):
        assert result.token_ids == answer(prompt, 5 + prompt[0])
    assert router.num_sessions == 1
    assert client.num_requests_in_flight == 0


async def test_streams_interleave_without_mixing(client: AsyncClient, router: Any, answer: Any) -> None:
    go = {1: asyncio.Event(), 2: asyncio.Event()}

    async def in_turns(call: Any) -> None:
        me = call.call.request.token_ids[0]
        await call.next_tokens(1)
        await go[me].wait()
        await call.next_tokens(1)
        await call.finish()

    router.script = in_turns
    sampling = SamplingParams(max_tokens=2)
    first, second = client.generate([1], sampling=sampling), client.generate([2], sampling=sampling)
    assert (await anext(first)).token_ids == answer([1], 1)
    assert (await anext(second)).token_ids == answer([2], 1)
    go[2].set()
    assert (await anext(second)).token_ids == answer([2], 2)[1:]
    go[1].set()
    assert (await anext(first)).token_ids == answer([1], 2)[1:]
    assert [chunk async for chunk in first] == []


async def test_the_router_is_asked_for_what_the_caller_asked(client: AsyncClient, router: Any) -> None:
    sampling = SamplingParams(max_tokens=3, temperature=0.5, seed=7, stop_token_ids=(9,))
    await client.complete(
        [4, 5], model="tiny", sampling=sampling, timeout_s=60, request_id="mine", cache_salt=b"salt"
    )
    call = router.calls[0].call
    assert (call.request_id, call.model) == ("mine", "tiny")
    assert call.request.token_ids == (4, 5)
    assert call.request.sampling == sampling
    assert call.request.cache_salt == b"salt"
    assert 0 < call.timeout_s <= 60


async def test_a_seed_and_a_request_id_are_drawn_where_none_is_given(
    client: AsyncClient, router: Any
) -> None:
    for _ in range(2):
        await client.complete([1], sampling=SamplingParams(max_tokens=1, temperature=1.0))
    await client.complete([1], sampling=SamplingParams(max_tokens=1))
    first, second, greedy = (call.call for call in router.calls)
    assert first.request_id
    assert first.request_id != second.request_id
    assert None is not first.request.sampling.seed != second.request.sampling.seed
    assert greedy.request.sampling.seed is None


async def test_logprobs_come_for_the_stream_that_asked(client: AsyncClient, router: Any) -> None:
    async def with_logprobs(call: Any) -> None:
        wanted = call.call.request.sampling.num_logprobs is not None
        entry = TokenLogprobs(-0.5, ((1, -0.5), (2, -1.5)))
        await call.tokens(1, 2, logprobs=[entry, entry] if wanted else None)
        await call.tokens(3, logprobs=[entry])
        await call.finish()

    router.script = with_logprobs
    asked = await client.complete([1], sampling=SamplingParams(max_tokens=3, num_logprobs=2))
    plain = await client.complete([1], sampling=SamplingParams(max_tokens=3))
    assert [entry.top[1] for entry in asked.logprobs if entry] == [(2, -1.5)] * 3
    assert plain.logprobs == ()


async def test_an_answer_without_any_token_is_an_error(client: AsyncClient, router: Any) -> None:
    async def nothing(call: Any) -> None:
        await call.finish()

    router.script = nothing
    with pytest.raises(KVRelayError, match="0 of 0 tokens"):
        await client.complete([1])


async def test_tokens_that_went_missing_are_never_passed_over(
    client: AsyncClient, router: Any, answer: Any
) -> None:
    async def loses_one(call: Any) -> None:
        await call.next_tokens(2)
        if len(router.calls) == 1:
            await call.finish(num_tokens=3)
        else:
            await call.next_tokens(1)
            await call.finish()

    router.script = loses_one
    result = await client.complete([1], sampling=SamplingParams(max_tokens=5))
    assert result.token_ids == answer([1], 5)
    assert result.num_continuations == 1


async def test_more_tokens_than_asked_for_end_the_request(client: AsyncClient, router: Any) -> None:
    async def too_many(call: Any) -> None:
        await call.next_tokens(4)
        await call.cancelled.wait()

    router.script = too_many
    with pytest.raises(KVRelayError, match=r"more tokens than sampling\.max_tokens \(3\)"):
        await client.complete([1], sampling=SamplingParams(max_tokens=3))
    await router.calls[0].wait_cancelled()


async def test_a_stream_that_is_never_read_asks_nothing(client: AsyncClient, router: Any) -> None:
    stream = client.generate([1])
    del stream
    await client.list_models()
    assert router.num_sessions == 0


async def test_there_is_no_result_before_the_end(client: AsyncClient) -> None:
    stream = client.generate([1], sampling=SamplingParams(max_tokens=2))
    with pytest.raises(KVRelayError, match="no result"):
        _ = stream.result
    async for _ in stream:
        pass
    assert len(stream.result.token_ids) == 2
    assert [chunk async for chunk in stream] == []


async def test_a_reader_that_falls_behind_loses_its_request_and_no_other(
    router: Any, config: ClientConfig, answer: Any
) -> None:
    gate = asyncio.Event()

    async def flood(call: Any) -> None:
        await call.next_tokens(1)
        if call.call.request_id == "slow":
            for _ in range(10):
                await call.next_tokens(2)
            gate.set()
            await call.cancelled.wait()
        else:
            await gate.wait()
            await call.next_tokens(1)
            await call.finish()

    router.script = flood
    small = ClientConfig(max_buffered_tokens=8, cache_dir=config.cache_dir)
    async with AsyncClient(router.address, config=small) as client:
        slow = client.generate([1], request_id="slow", sampling=SamplingParams(max_tokens=100))
        received = list((await anext(slow)).token_ids)
        other = await client.complete([2], sampling=SamplingParams(max_tokens=2))
        assert other.token_ids == answer([2], 2)
        await router.calls[0].wait_cancelled()
        received += (await anext(slow)).token_ids
        with pytest.raises(Overloaded, match="max_buffered_tokens"):
            await anext(slow)
        assert tuple(received) == answer([1], len(received))
        assert len(router.calls) == 2


async def test_requests_in_flight_are_bounded(router: Any, config: ClientConfig) -> None:
    async def first_only(call: Any) -> None:
        await call.next_tokens(1)
        await call.cancelled.wait()

    router.script = first_only
    async with AsyncClient(router.address, config=ClientConfig(max_requests_in_flight=1)) as client:
        held = client.generate([1])
        await anext(held)
        with pytest.raises(Overloaded, match="max_requests_in_flight"):
            await client.complete([2])
        await held.aclose()
        assert client.num_requests_in_flight == 0
        again = client.generate([3])
        await anext(again)
