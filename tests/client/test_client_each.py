"""`each`: chunks are taken where they arrive, and nothing differs from reading them one by one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvrelay.client import AsyncClient, ClientConfig, FinishReason, SamplingParams
from kvrelay.core.errors import DeadlineExceeded, EngineFailed, KVRelayError, RequestCancelled

SIX = SamplingParams(max_tokens=6)


async def one_by_one(call: Any) -> None:
    for _ in range(call.call.request.num_remaining_tokens):
        await call.next_tokens(1)
    await call.finish()


async def test_every_chunk_is_taken_once_and_the_result_is_whole(
    client: AsyncClient, router: Any, answer: Any
) -> None:
    router.script = one_by_one
    taken: list[tuple[int, int]] = []

    def take(chunk: Any) -> None:
        taken.extend(enumerate(chunk.token_ids, chunk.index))

    streams = [client.generate([number], sampling=SIX) for number in range(20)]
    await asyncio.gather(*(stream.each(take) for stream in streams))
    for number, stream in enumerate(streams):
        assert stream.result.token_ids == answer([number], 6)
    assert sorted(index for index, _ in taken) == sorted(list(range(6)) * 20)
    assert client.num_requests_in_flight == 0


async def test_most_chunks_come_without_waking_the_reader(client: AsyncClient, router: Any) -> None:
    router.script = one_by_one
    takers: list[asyncio.Task[Any] | None] = []
    stream = client.generate([1], sampling=SamplingParams(max_tokens=50))
    await stream.each(lambda chunk: takers.append(asyncio.current_task()))
    assert sum(task is not asyncio.current_task() for task in takers) > 0


async def test_what_take_returns_is_awaited_before_the_next_chunk(
    client: AsyncClient, router: Any, answer: Any
) -> None:
    router.script = one_by_one
    is_waiting, indices = False, []

    async def wait() -> None:
        nonlocal is_waiting
        await asyncio.sleep(0)
        is_waiting = False

    def take(chunk: Any) -> Any:
        nonlocal is_waiting
        assert not is_waiting
        indices.extend(range(chunk.index, chunk.index + len(chunk.token_ids)))
        is_waiting = True
        return wait()

    stream = client.generate([3], sampling=SamplingParams(max_tokens=40))
    await stream.each(take)
    assert indices == list(range(40))
    assert stream.result.token_ids == answer([3], 40)


@pytest.mark.parametrize("fails_at", [0, 3])
async def test_an_error_of_take_cancels_the_request_and_is_raised(
    client: AsyncClient, router: Any, fails_at: int
) -> None:
    async def endless(call: Any) -> None:
        await call.next_tokens(1)
        for _ in range(5):
            await call.next_tokens(1)
        await call.cancelled.wait()

    router.script = endless

    def take(chunk: Any) -> None:
        if chunk.index >= fails_at:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        await client.generate([1], sampling=SamplingParams(max_tokens=50)).each(take)
    await router.calls[0].wait_cancelled()
    assert client.num_requests_in_flight == 0


async def test_one_streams_error_leaves_the_others_alone(
    client: AsyncClient, router: Any, answer: Any
) -> None:
    router.script = one_by_one

    def fail(chunk: Any) -> None:
        if chunk.index >= 2:
            raise ZeroDivisionError

    good = [client.generate([number], sampling=SIX) for number in range(4)]
    bad = [client.generate([9], sampling=SIX) for _ in range(4)]
    found = await asyncio.gather(
        *(stream.each(lambda chunk: None) for stream in good),
        *(stream.each(fail) for stream in bad),
        return_exceptions=True,
    )
    assert [type(error) for error in found] == [type(None)] * 4 + [ZeroDivisionError] * 4
    assert [stream.result.token_ids for stream in good] == [answer([number], 6) for number in range(4)]


async def test_a_failed_attempt_is_continued(client: AsyncClient, router: Any, answer: Any) -> None:
    async def breaks_once(call: Any) -> None:
        if len(router.calls) > 1:
            await one_by_one(call)
            return
        for _ in range(3):
            await call.next_tokens(1)
        await call.fail(EngineFailed("node lost"))

    router.script = breaks_once
    indices: list[int] = []
    stream = client.generate([5], sampling=SIX)
    await stream.each(lambda chunk: indices.extend(range(chunk.index, chunk.index + len(chunk.token_ids))))
    assert indices == list(range(6))
    assert stream.result.token_ids == answer([5], 6)
    assert stream.result.num_continuations == 1


async def test_more_tokens_than_asked_for_are_an_error(client: AsyncClient, router: Any) -> None:
    async def too_many(call: Any) -> None:
        for _ in range(9):
            await call.next_tokens(1)
        await call.wait_cancelled()

    router.script = too_many
    with pytest.raises(KVRelayError, match=r"more tokens than sampling.max_tokens \(6\)"):
        await client.generate([5], sampling=SIX).each(lambda chunk: None)
    assert client.num_requests_in_flight == 0


async def test_a_stop_string_ends_it(
    client: AsyncClient, text_router: Any, byte_level_tokenizer: Any
) -> None:
    async def script(call: Any) -> None:
        for token_id in byte_level_tokenizer.encode("the lazy dog").ids:
            await call.tokens(token_id)
        await call.wait_satisfied()
        await call.finish(FinishReason.STOP)

    text_router.script = script
    parts: list[str] = []
    stream = client.generate("x", sampling=SamplingParams(max_tokens=100), stop=["dog"])
    await stream.each(lambda chunk: parts.append(chunk.text))
    assert "".join(parts) == "the lazy " == stream.result.text
    assert stream.result.stop_text == "dog"


async def test_cancel_and_time_out_end_it(router: Any, config: ClientConfig) -> None:
    async def hang(call: Any) -> None:
        await call.next_tokens(1)
        await call.cancelled.wait()

    router.script = hang
    async with AsyncClient(router.address, config=config) as client:
        has_begun = asyncio.Event()
        stream = client.generate([1], sampling=SIX)
        reading = asyncio.create_task(stream.each(lambda chunk: has_begun.set()))
        await has_begun.wait()
        stream.cancel()
        with pytest.raises(RequestCancelled):
            await reading
        with pytest.raises(DeadlineExceeded):
            await client.generate([1], sampling=SIX, timeout_s=0.05).each(lambda chunk: None)
        for call in router.calls:
            await call.wait_cancelled()
        assert client.num_requests_in_flight == 0


async def test_what_comes_while_a_chunk_is_waited_for_is_taken_after_it(
    client: AsyncClient, router: Any
) -> None:
    async def one(call: Any) -> None:
        await call.next_tokens(1)
        await call.cancelled.wait()

    router.script = one
    log: list[str] = []
    waited = [asyncio.Event() for _ in range(3)]

    async def wait(index: int) -> None:
        await asyncio.sleep(0)
        log.append(f"waited {index}")
        waited[index].set()

    def take(chunk: Any) -> Any:
        log.append(f"took {chunk.index}")
        return wait(chunk.index)

    stream = client.generate([1], sampling=SIX)
    reading = asyncio.create_task(stream.each(take))
    await waited[0].wait()
    mailbox = stream._generation._mailbox
    for _ in range(3):  # passes of the loop, until the reader waits again
        await asyncio.sleep(0)
    assert mailbox.has_reader
    mailbox.put_token(5, 0.0)  # taken where it comes
    mailbox.put_token(6, 0.0)  # in the same pass of the event loop: has to wait
    async with asyncio.timeout(30):
        await waited[2].wait()
    assert log == [f"{what} {index}" for index in range(3) for what in ("took", "waited")]
    stream.cancel()
    with pytest.raises(RequestCancelled):
        await reading
