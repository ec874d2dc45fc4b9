"""The blocking client does what the asynchronous one does, from any thread."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from kvrelay.client import Client, ClientConfig, SamplingParams
from kvrelay.core.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    RequestCancelled,
    UnknownRequest,
)

T = TypeVar("T")


async def off_loop(function: Callable[[], T]) -> T:
    """The routers of these tests live on the test's event loop, so what blocks goes to a thread."""
    return await asyncio.to_thread(function)


async def two_then_wait(call: Any) -> None:
    await call.next_tokens(2)
    await call.cancelled.wait()


async def never(call: Any) -> None:
    await call.cancelled.wait()


@pytest.fixture
def num_threads_before() -> int:
    return len([thread for thread in threading.enumerate() if thread.name == "kvrelay client"])


async def test_everything_works_without_async(
    text_router: Any, config: ClientConfig, answer: Any, num_threads_before: int
) -> None:
    text_router.live_ids = {"r1"}

    def use() -> None:
        with Client(text_router.address, config=config) as client:
            stream = client.generate([1, 2], sampling=SamplingParams(max_tokens=5), request_id="r1")
            token_ids = [token for chunk in stream for token in chunk.token_ids]
            assert tuple(token_ids) == answer([1, 2], 5) == stream.result.token_ids == stream.token_ids
            assert stream.request_id == "r1"
            assert client.complete("fox", sampling=SamplingParams(max_tokens=1)).token_ids
            assert [model.name for model in client.list_models()] == ["tiny"]
            assert client.cluster_state().router_id == "fake"
            assert client.detokenize(client.tokenize("the fox")) == "the fox"
            assert client.tokenizer().encode("x")
            client.cancel("r1")
            with pytest.raises(UnknownRequest, match="no r1, of 128"):
                client.explain("r1")
            assert client.addresses == (text_router.address,)

    await off_loop(use)
    assert text_router.cancelled_ids == ["r1"]
    await text_router.wait_no_sessions()
    assert len([t for t in threading.enumerate() if t.name == "kvrelay client"]) == num_threads_before


async def test_many_threads_share_one_client_and_one_session(
    router: Any, config: ClientConfig, answer: Any
) -> None:
    def use() -> None:
        with Client(router.address, config=config) as client, ThreadPoolExecutor(8) as pool:

            def ask(number: int) -> tuple[int, ...]:
                sampling = SamplingParams(max_tokens=3 + number)
                return tuple(
                    token
                    for chunk in client.generate([number], sampling=sampling)
                    for token in chunk.token_ids
                )

            answers = list(pool.map(ask, range(1, 33)))
        assert answers == [answer([number], 3 + number) for number in range(1, 33)]

    await off_loop(use)
    assert router.num_sessions == 1


async def test_leaving_the_loop_cancels(router: Any, config: ClientConfig) -> None:
    router.script = two_then_wait
    client = Client(router.address, config=config)

    def use() -> None:
        stream = client.generate([1])
        for _ in stream:
            break
        assert list(stream) == []

    await off_loop(use)
    await router.calls[0].wait_cancelled()
    await off_loop(client.close)


async def test_cancel_from_another_thread_wakes_the_reader(router: Any, config: ClientConfig) -> None:
    router.script = never
    client = Client(router.address, config=config)
    stream = client.generate([1])
    reading = asyncio.create_task(off_loop(lambda: list(stream)))
    await router.wait_calls(1)
    stream.cancel()
    with pytest.raises(RequestCancelled, match="by its caller"):
        await reading
    await router.calls[0].wait_cancelled()
    await off_loop(client.close)


async def test_errors_are_the_same(router: Any, config: ClientConfig) -> None:
    router.script = two_then_wait

    def use() -> None:
        with Client(router.address, config=config) as client:
            with pytest.raises(DeadlineExceeded):
                client.complete([1], timeout_s=0.1)
            with pytest.raises(InvalidRequest) as caught:
                client.generate("")
            assert caught.value.field == "prompt"
        with pytest.raises(ConfigError):
            Client([])

    await off_loop(use)


async def test_a_closed_client_refuses_and_closes_again(router: Any, config: ClientConfig) -> None:
    def use() -> None:
        client = Client(router.address, config=config)
        client.complete([1], sampling=SamplingParams(max_tokens=1))
        client.close()
        client.close()
        with pytest.raises(RequestCancelled, match="closed"):
            client.complete([1])
        with pytest.raises(RequestCancelled, match="closed"):
            client.list_models()

    await off_loop(use)


async def test_closing_wakes_a_reader_in_another_thread(router: Any, config: ClientConfig) -> None:
    router.script = never
    client = Client(router.address, config=config)
    reading = asyncio.create_task(off_loop(lambda: client.complete([1])))
    await router.wait_calls(1)
    await off_loop(client.close)
    with pytest.raises(RequestCancelled, match="closed"):
        await reading


async def test_the_cluster_can_be_watched(router: Any, config: ClientConfig) -> None:
    def use() -> list[str]:
        with Client(router.address, config=config) as client:
            seen = []
            for state in client.watch_cluster():
                seen.append(state.router_id)
                if len(seen) == 2:
                    break
            return seen

    router.states = [type(router.states[0])(router_id=name) for name in ("a", "b", "c")]
    assert await off_loop(use) == ["a", "b"]


def test_a_forgotten_client_ends_its_thread(num_threads_before: int) -> None:
    client = Client("127.0.0.1:9")
    del client
    gc.collect()
    while len([t for t in threading.enumerate() if t.name == "kvrelay client"]) > num_threads_before:
        time.sleep(0)
