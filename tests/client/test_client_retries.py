"""What is repeated, what is continued elsewhere, and what is not."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from kvrelay.client import AsyncClient, ClientConfig, SamplingParams
from kvrelay.core.errors import (
    ContextLengthExceeded,
    DuplicateRequest,
    EngineFailed,
    KVRelayError,
    NodeUnavailable,
    Overloaded,
    RequestCancelled,
    RouterUnavailable,
)


def free_port() -> int:
    """A port that nobody listens on, most likely."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fails(*errors: KVRelayError) -> Any:
    """A script that fails with these, one a call, and then answers."""
    left = list(errors)

    async def script(call: Any) -> None:
        if left:
            await call.fail(left.pop(0))
        else:
            await call.next_tokens(call.call.request.num_remaining_tokens)
            await call.finish()

    return script


async def test_retryable_errors_before_the_first_token_are_repeated(
    client: AsyncClient, router: Any, answer: Any
) -> None:
    router.script = fails(Overloaded("full", retry_after_s=0.001), NodeUnavailable("none"))
    result = await client.complete([1], sampling=SamplingParams(max_tokens=3), request_id="r")
    assert result.token_ids == answer([1], 3)
    assert (result.num_retries, result.num_continuations) == (2, 0)
    assert [call.call.request_id for call in router.calls] == ["r"] * 3


async def test_retries_are_bounded_and_the_last_error_is_raised(router: Any, config: ClientConfig) -> None:
    router.script = fails(*(NodeUnavailable(f"try {number}") for number in range(10)))
    few = ClientConfig(max_retries=2, backoff_base_s=0.001, backoff_max_s=0.002, cache_dir=config.cache_dir)
    async with AsyncClient(router.address, config=few) as client:
        with pytest.raises(NodeUnavailable, match="try 2"):
            await client.complete([1])
    assert len(router.calls) == 3


@pytest.mark.parametrize(
    "error",
    [
        ContextLengthExceeded("too long", field="prompt_token_ids"),
        RequestCancelled("by someone"),
        DuplicateRequest("twice", field="request_id"),
        KVRelayError("a bug"),
    ],
)
async def test_what_repeating_can_not_help_is_raised_at_once(
    client: AsyncClient, router: Any, error: KVRelayError
) -> None:
    router.script = fails(error)
    with pytest.raises(type(error), match=error.message) as caught:
        await client.complete([1])
    assert caught.value.field == error.field
    assert len(router.calls) == 1
    assert client.num_requests_in_flight == 0


async def test_a_duplicate_left_by_our_own_lost_attempt_is_waited_out(
    client: AsyncClient, router: Any, answer: Any
) -> None:
    router.script = fails(NodeUnavailable("lost"), DuplicateRequest("still releasing"))
    result = await client.complete([1], sampling=SamplingParams(max_tokens=2))
    assert result.token_ids == answer([1], 2)


async def test_what_a_lost_session_left_at_its_router_is_cancelled_there(
    client: AsyncClient, router: Any, answer: Any
) -> None:
    """Seed 1071 of the fault simulation: else the id stays taken until the router notices the loss."""
    router.live_ids.add("mine")
    router.script = fails(NodeUnavailable("lost"), DuplicateRequest("request_id 'mine' is in use"))
    result = await client.complete([1], sampling=SamplingParams(max_tokens=2), request_id="mine")
    assert result.token_ids == answer([1], 2)
    assert router.cancelled_ids == ["mine"]


async def test_a_pause_that_would_outlast_the_deadline_is_not_begun(client: AsyncClient, router: Any) -> None:
    router.script = fails(Overloaded("come back later", retry_after_s=50))
    with pytest.raises(Overloaded, match="come back later"):
        await client.complete([1], timeout_s=30)
    assert len(router.calls) == 1


async def test_a_failure_after_the_first_token_is_continued_not_begun_again(
    client: AsyncClient, router: Any, answer: Any
) -> None:
    async def breaks_once(call: Any) -> None:
        await call.next_tokens(3)
        if len(router.calls) == 1:
            await call.fail(EngineFailed("node lost"))
        else:
            await call.finish()

    router.script = breaks_once
    result = await client.complete([5, 6], sampling=SamplingParams(max_tokens=6, temperature=1.0))
    assert result.token_ids == answer([5, 6], 6)
    assert (result.num_retries, result.num_continuations) == (0, 1)
    first, second = (call.call.request for call in router.calls)
    assert second.token_ids == (5, 6, *answer([5, 6], 3))
    assert second.num_prompt_tokens == 2
    assert second.sampling == first.sampling
    assert second.sampling.seed is not None


async def test_a_killed_router_is_replaced_mid_stream_and_each_index_comes_once(
    start_router: Any, config: ClientConfig, answer: Any
) -> None:
    routers = [await start_router(), await start_router()]
    is_cut = asyncio.Event()

    async def stops_halfway(call: Any) -> None:
        if is_cut.is_set():
            await call.next_tokens(call.call.request.num_remaining_tokens)
            await call.finish()
        else:
            await call.next_tokens(5)
            await call.cancelled.wait()

    for router in routers:
        router.script = stops_halfway
    async with AsyncClient([router.address for router in routers], config=config) as client:
        sampling = SamplingParams(max_tokens=12)
        stream = client.generate([9, 9], sampling=sampling, request_id="r")
        indices = []
        async for chunk in stream:
            indices += range(chunk.index, chunk.index + len(chunk.token_ids))
            if len(indices) == 5 and not is_cut.is_set():
                is_cut.set()
                victim = next(router for router in routers if router.calls)
                survivor = next(router for router in routers if router is not victim)
                await victim.kill()
        result = stream.result
    assert indices == list(range(12))
    assert result.token_ids == answer([9, 9], 12)
    assert result.num_continuations == 1
    assert result.router == survivor.address
    assert survivor.calls[0].call.request.num_output_tokens == 5
    assert survivor.calls[0].call.request_id == "r"


async def test_all_streams_of_a_killed_router_go_on_elsewhere(
    start_router: Any, config: ClientConfig, answer: Any
) -> None:
    routers = [await start_router(), await start_router()]
    is_cut = False

    async def script(call: Any) -> None:
        begins_after_the_cut = is_cut
        await call.next_tokens(1)
        if not begins_after_the_cut:
            await call.cancelled.wait()
        else:
            await call.next_tokens(3)
            await call.finish()

    for router in routers:
        router.script = script
    async with AsyncClient([router.address for router in routers], config=config) as client:
        streams = [
            client.generate([number], sampling=SamplingParams(max_tokens=6)) for number in range(1, 21)
        ]
        for stream in streams:
            await anext(stream)
        assert [len(router.calls) for router in routers] == [10, 10]
        is_cut = True
        begun_before = list(routers[1].calls)
        await routers[0].kill()
        for call in begun_before:
            await call.fail(EngineFailed("go on"))

        async def read(stream: Any) -> Any:
            async for _ in stream:
                pass
            return stream.result

        results = await asyncio.gather(*(read(stream) for stream in streams))
    for number, result in enumerate(results, start=1):
        assert result.token_ids == answer([number], 5)
        assert (result.num_continuations, result.router) == (1, routers[1].address)


async def test_a_refused_request_is_repeated_at_another_router(
    start_router: Any, config: ClientConfig, answer: Any
) -> None:
    full, free = await start_router(), await start_router()
    async with AsyncClient([full.address, free.address], config=config) as client:

        async def refuse(call: Any) -> None:
            await client.cluster_state()  # takes the other's turn
            await call.fail(NodeUnavailable("draining"))

        full.script = refuse
        for number in range(4):
            result = await client.complete([number], sampling=SamplingParams(max_tokens=1))
            assert (result.token_ids, result.router) == (answer([number], 1), free.address)
            assert result.num_retries <= 1


async def test_a_lost_router_that_comes_back_is_dialled_again(
    start_router: Any, config: ClientConfig, answer: Any
) -> None:
    router = await start_router()
    async with AsyncClient(router.address, config=config) as client:
        sampling = SamplingParams(max_tokens=2)
        await client.complete([1], sampling=sampling)
        await router.kill()
        with pytest.raises(RouterUnavailable, match=router.address):
            await client.complete([2], sampling=sampling)
        port = int(router.address.rpartition(":")[2])
        await router.start(port)
        assert (await client.complete([3], sampling=sampling)).token_ids == answer([3], 2)


async def test_when_no_router_answers_all_addresses_are_named(config: ClientConfig) -> None:
    addresses = [f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"]
    few = ClientConfig(max_retries=1, backoff_base_s=0.001, cache_dir=config.cache_dir)
    async with AsyncClient(addresses, config=few) as client:
        calls = (client.complete([1]), client.list_models(), client.cluster_state(), client.cancel("r"))
        for call in calls:
            with pytest.raises(RouterUnavailable, match="no router answers") as caught:
                await call
            assert addresses[0] in caught.value.message
        with pytest.raises(RouterUnavailable) as caught:
            await client.complete([1])
        assert all(address in caught.value.message for address in addresses)
        assert "refused" in caught.value.message


async def test_an_address_that_is_down_is_passed_over(router: Any, config: ClientConfig, answer: Any) -> None:
    addresses = [f"127.0.0.1:{free_port()}", router.address]
    async with AsyncClient(addresses, config=config) as client:
        for number in range(4):
            result = await client.complete([number], sampling=SamplingParams(max_tokens=1))
            assert (result.token_ids, result.router) == (answer([number], 1), router.address)


async def test_requests_take_the_routers_in_turn(start_router: Any, config: ClientConfig) -> None:
    routers = [await start_router() for _ in range(3)]
    async with AsyncClient(",".join(router.address for router in routers), config=config) as client:
        for _ in range(6):
            await client.complete([1], sampling=SamplingParams(max_tokens=1))
    assert [len(router.calls) for router in routers] == [2, 2, 2]


async def test_a_router_that_sends_nonsense_is_left_for_another(
    start_router: Any, config: ClientConfig, answer: Any
) -> None:
    bad, good = await start_router(), await start_router()

    async def nonsense(call: Any) -> None:
        await call.raw(stream_ids=[call.stream_id], counts=[5], token_ids=[1])

    bad.script = nonsense
    grudging = ClientConfig(backoff_base_s=60, backoff_max_s=60, cache_dir=config.cache_dir)
    async with AsyncClient([bad.address, good.address], config=grudging) as client:
        for _ in range(4):
            result = await client.complete([1], sampling=SamplingParams(max_tokens=2))
            assert (result.token_ids, result.router) == (answer([1], 2), good.address)
    assert len(bad.calls) == 1


async def test_unary_calls_are_repeated_too(client: AsyncClient, router: Any) -> None:
    router.unary_errors = [Overloaded("busy"), NodeUnavailable("busy")]
    assert [model.name for model in await client.list_models()] == ["tiny"]
    router.unary_errors = [KVRelayError("broken")]
    with pytest.raises(KVRelayError, match="broken"):
        await client.cluster_state()
