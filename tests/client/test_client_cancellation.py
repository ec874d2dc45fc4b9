"""However a caller goes away, the router hears of it at once."""

from __future__ import annotations

import asyncio
import gc
import socket
from dataclasses import replace
from typing import Any

import pytest

from kvrelay.client import AsyncClient, ClientConfig, SamplingParams
from kvrelay.core.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RequestCancelled,
    RouterUnavailable,
    UnknownRequest,
)


async def two_then_wait(call: Any) -> None:
    await call.next_tokens(2)
    await call.cancelled.wait()


async def never(call: Any) -> None:
    await call.cancelled.wait()


@pytest.fixture
def waiting_router(router: Any) -> Any:
    router.script = two_then_wait
    return router


async def test_leaving_the_loop_cancels(client: AsyncClient, waiting_router: Any) -> None:
    stream = client.generate([1])
    async for _ in stream:
        break
    await waiting_router.calls[0].wait_cancelled()
    assert client.num_requests_in_flight == 0
    assert [chunk async for chunk in stream] == []


async def test_an_error_in_the_loop_cancels(client: AsyncClient, waiting_router: Any) -> None:
    async def read() -> None:
        async for _ in client.generate([1]):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await read()
    gc.collect()
    await waiting_router.calls[0].wait_cancelled()


async def test_dropping_a_half_read_stream_cancels(client: AsyncClient, waiting_router: Any) -> None:
    stream = client.generate([1])
    await anext(stream)
    del stream
    await waiting_router.calls[0].wait_cancelled()


async def test_the_end_of_async_with_cancels(client: AsyncClient, waiting_router: Any) -> None:
    async with client.generate([1]) as stream:
        await anext(stream)
    await waiting_router.calls[0].wait_cancelled()
    assert client.num_requests_in_flight == 0


async def test_cancelling_the_reading_task_cancels(client: AsyncClient, router: Any) -> None:
    router.script = never
    task = asyncio.create_task(client.complete([1]))
    await router.wait_calls(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await router.calls[0].wait_cancelled()
    assert client.num_requests_in_flight == 0


async def test_cancel_wakes_the_reader(client: AsyncClient, router: Any) -> None:
    router.script = never
    stream = client.generate([1])
    reading = asyncio.create_task(anext(stream))
    await router.wait_calls(1)
    stream.cancel()
    with pytest.raises(RequestCancelled):
        await reading
    await router.calls[0].wait_cancelled()
    stream.cancel()
    assert [chunk async for chunk in stream] == []


async def test_cancel_ends_a_pause_between_two_attempts(client: AsyncClient, router: Any) -> None:
    failed = asyncio.Event()

    async def refuse(call: Any) -> None:
        await call.fail(Overloaded("full", retry_after_s=50))
        failed.set()

    router.script = refuse
    stream = client.generate([1])
    reading = asyncio.create_task(anext(stream))
    await failed.wait()
    await client.cluster_state()
    for _ in range(3):
        stream.cancel()
    with pytest.raises(RequestCancelled):
        await reading
    assert len(router.calls) == 1
    assert client.num_requests_in_flight == 0


async def test_the_timeout_ends_an_attempt_to_connect(config: ClientConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        port = silent.getsockname()[1]
        async with AsyncClient(f"127.0.0.1:{port}", config=config) as client:
            with pytest.raises(DeadlineExceeded):
                await client.complete([1], timeout_s=0.1)
            assert client.num_requests_in_flight == 0


async def test_a_router_that_says_nothing_is_given_up_after_connect_timeout_s(config: ClientConfig) -> None:
    impatient = replace(config, connect_timeout_s=0.05, max_retries=0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        async with AsyncClient(f"127.0.0.1:{port}", config=impatient) as client:
            with pytest.raises(RouterUnavailable, match=rf"{port} \(no answer within 0\.05 s\)"):
                await client.complete([1])


async def test_cancel_between_two_reads_ends_the_iteration(client: AsyncClient, waiting_router: Any) -> None:
    stream = client.generate([1])
    async for _ in stream:
        stream.cancel()
    await waiting_router.calls[0].wait_cancelled()


async def test_other_streams_go_on_when_one_is_cancelled(
    client: AsyncClient, router: Any, answer: Any
) -> None:
    go = asyncio.Event()

    async def script(call: Any) -> None:
        await call.next_tokens(1)
        await go.wait()
        if not call.cancelled.is_set():
            await call.next_tokens(1)
            await call.finish()

    router.script = script
    kept, dropped = client.generate([1]), client.generate([2])
    await anext(kept)
    await anext(dropped)
    dropped.cancel()
    await router.calls[1].wait_cancelled()
    go.set()
    assert (await anext(kept)).token_ids == answer([1], 2)[1:]
    assert [chunk async for chunk in kept] == []
    assert len(kept.result.token_ids) == 2


async def test_the_timeout_is_kept_by_the_client_and_cancels(client: AsyncClient, router: Any) -> None:
    router.script = never
    with pytest.raises(DeadlineExceeded, match=r"0\.2 s"):
        await client.complete([1], timeout_s=0.2)
    await router.calls[0].wait_cancelled()
    assert client.num_requests_in_flight == 0


async def test_the_timeout_counts_over_all_tokens(client: AsyncClient, waiting_router: Any) -> None:
    stream = client.generate([1], timeout_s=0.3)
    with pytest.raises(DeadlineExceeded):
        async for _ in stream:
            pass
    assert len(stream.token_ids) == 2


async def test_closing_the_client_ends_everything(router: Any, config: ClientConfig) -> None:
    router.script = two_then_wait
    client = AsyncClient(router.address, config=config)
    stream = client.generate([1])
    await anext(stream)
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    await client.aclose()
    with pytest.raises(RequestCancelled, match="closed"):
        await reading
    await router.wait_no_sessions()
    with pytest.raises(RequestCancelled, match="closed"):
        await client.complete([1])
    with pytest.raises(RequestCancelled, match="closed"):
        await client.cancel("r")
    await client.aclose()


async def test_closing_the_client_leaves_no_task(router: Any, config: ClientConfig) -> None:
    before = asyncio.all_tasks()
    async with AsyncClient(router.address, config=config) as client:
        await client.complete([1], sampling=SamplingParams(max_tokens=2))
        assert any(task.get_name().startswith("kvrelay") for task in asyncio.all_tasks())
    await router.wait_no_sessions()
    assert not [task for task in asyncio.all_tasks() - before if task.get_name().startswith("kvrelay")]


async def test_cancel_by_id_reaches_the_router_that_has_it(start_router: Any, config: ClientConfig) -> None:
    routers = [await start_router() for _ in range(3)]
    routers[1].live_ids = {"r7"}
    async with AsyncClient([router.address for router in routers], config=config) as client:
        await client.cancel("r7")
        assert [router.cancelled_ids for router in routers] == [[], ["r7"], []]
        with pytest.raises(UnknownRequest, match="r8"):
            await client.cancel("r8")
        for bad in ("", "x" * 129, "a\nb", 5):
            with pytest.raises(InvalidRequest) as caught:
                await client.cancel(bad)
            assert caught.value.field == "request_id"
