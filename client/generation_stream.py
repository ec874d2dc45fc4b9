"""The answer to one request, as its caller reads it."""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import suppress
from types import TracebackType
from typing import Self

from kvrelay.client.generation import Generation, TakeChunk
from kvrelay.client.results import GenerationChunk, GenerationResult
from kvrelay.core.errors import KVRelayError


class GenerationStream:
    """Iterate to get `GenerationChunk`s; then `result` has the whole. The first read starts the request.

    Leaving the loop early, `cancel`, `aclose`, the end of ``async with`` and the cancellation of the reading
    task all cancel the request at the router at once. One task reads; all happens on one event loop.

    Raises (while iterating):
        RequestCancelled: by `cancel` from another task, by someone else, or because the client was closed.
        DeadlineExceeded: `timeout_s` has passed since the first read.
        Overloaded: the cluster or this client is full, or this reader fell too far behind.
        KVRelayError: whatever else went wrong, once repeating it did not help.
    """

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    @property
    def request_id(self) -> str:
        """Names the request at every router that serves it."""
        return self._generation.ask.request_id

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All output tokens read so far."""
        progress = self._generation.progress
        return tuple(progress.token_ids) if progress else ()

    @property
    def num_tokens(self) -> int:
        """How many output tokens have been read so far."""
        progress = self._generation.progress
        return len(progress.token_ids) if progress else 0

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt as the model is shown it; empty before the first read."""
        progress = self._generation.progress
        return progress.call.request.token_ids if progress else ()

    @property
    def result(self) -> GenerationResult:
        """The whole answer.

        Raises:
            KVRelayError: the stream has not been read to its end, or failed.
        """
        result = self._generation.result
        if result is None:
            raise KVRelayError(f"request {self.request_id} has no result: it was not read to a good end")
        return result

    def cancel(self) -> None:
        """Stop the request at once. Reading ends; a task that waits gets `RequestCancelled`."""
        self._generation.cancel()

    async def aclose(self) -> None:
        """Cancel the request unless it is over."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __aiter__(self) -> GenerationIterator:
        return GenerationIterator(self)

    async def __anext__(self) -> GenerationChunk:
        try:
            chunk = await self._generation.next_chunk()
        except BaseException:
            self._generation.leave()
            raise
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def each(self, take: TakeChunk) -> None:
        """Give `take` every chunk to the end, in place of iterating, for who serves many streams: in steady
        decode a chunk is taken where it arrives, and no task is woken for it.

        `take` must not block. What it returns is awaited (None: nothing) before it gets the next chunk; what
        comes meanwhile is buffered, as for any reader. An error that it raises cancels the request and is
        raised here.
        """
        try:
            await self._generation.each(take)
        except BaseException:
            self._generation.leave()
            raise

    def __del__(self) -> None:
        self.abandon()

    def abandon(self) -> None:
        """Cancel because the reader has gone without a word. May be called from any thread, as the garbage
        collector does."""
        generation = self._generation
        if generation.is_over or generation.loop is None or generation.loop.is_closed():
            return
        with suppress(RuntimeError):  # the loop was closed in this very moment
            generation.loop.call_soon_threadsafe(generation.leave)


class GenerationIterator:
    """What an ``async for`` holds and drops: leaving the loop drops it, which cancels the request."""

    def __init__(self, stream: GenerationStream) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[GenerationChunk]:
        return self._stream.__anext__()

    def __del__(self) -> None:
        self._stream.abandon()
