"""The answers of one request: one or several streams of the cluster, read as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from kvrelay.client import GenerationChunk, GenerationStream

MAX_CHUNKS_AHEAD = 64
"""Of all choices together; beyond, the cluster's tokens wait in the client library, which bounds them."""

ChoiceChunk = tuple[int, GenerationChunk | None]
"""Choice, and its next part; None: it has ended, and its stream has a `result`."""


async def read_choices(streams: Sequence[GenerationStream]) -> AsyncGenerator[ChoiceChunk, None]:
    """Every part of every choice, in the order they come. Closing it cancels what is under way.

    The first choice starts alone: when its first part is here, its prompt is in the prefix cache, and the
    others need not compute it again.

    Raises:
        KVRelayError: a choice can't be served; the others are cancelled.
    """
    if len(streams) == 1:
        async for chunk in streams[0]:
            yield 0, chunk
        yield 0, None
        return
    async with aclosing(_read_many(streams)) as parts:
        async for part in parts:
            yield part


async def _read_many(streams: Sequence[GenerationStream]) -> AsyncGenerator[ChoiceChunk, None]:
    parts: asyncio.Queue[ChoiceChunk | BaseException] = asyncio.Queue(MAX_CHUNKS_AHEAD)
    has_begun = asyncio.Event()

    async def read(index: int, stream: GenerationStream, on_first: Callable[[], None] | None) -> None:
        try:
            if on_first is None:
                await has_begun.wait()
            async for chunk in stream:
                if on_first is not None:
                    on_first()
                await parts.put((index, chunk))
            await parts.put((index, None))
        except Exception as error:  # handed to who reads
            await parts.put(error)
        finally:
            stream.cancel()

    tasks = [
        asyncio.create_task(read(index, stream, None if index else has_begun.set))
        for index, stream in enumerate(streams)
    ]
    num_left = len(streams)
    try:
        while num_left:
            part = await parts.get()
            if isinstance(part, BaseException):
                raise part
            has_begun.set()
            num_left -= part[1] is None
            yield part
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
