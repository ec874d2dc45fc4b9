"""The writer of an `Attach` stream: steady rows go by their token ids, a due load rides with a frame."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import cast

from kvrelay.codec.cluster import TokenBatchDecoder
from kvrelay.core.node_messages import NodeLoad, Welcome
from kvrelay.node.attach_stream import AttachStream
from kvrelay.node.events import TokenColumns
from kvrelay.node.frame_writer import FrameWriter
from kvrelay.node.kv_feed import KVFeed
from kvrelay.node.monotonic_clock import MonotonicClock
from kvrelay.v1 import cluster_pb2

PATIENCE_S = 10.0
WELCOME = Welcome("r", 1, heartbeat_s=60.0, lease_s=60.0)


@dataclass
class Stream:
    """Takes frames while `is_open` is set, as a router does that reads."""

    frames: list[cluster_pb2.NodeFrame] = field(default_factory=list)
    is_open: asyncio.Event = field(default_factory=asyncio.Event)
    num_writes: int = 0

    async def write(self, frame: cluster_pb2.NodeFrame) -> None:
        self.num_writes += 1
        await self.is_open.wait()
        self.frames.append(frame)

    async def until(self, condition: Callable[[Stream], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition(self):  # noqa: ASYNC110  # the writer's turns are all that is waited for
                await asyncio.sleep(0)


@dataclass
class Load:
    num_running: int = 0

    def read(self) -> NodeLoad:
        self.num_running += 1
        return NodeLoad(num_running=self.num_running)


@asynccontextmanager
async def running_writer(load_interval_s: float = 60.0) -> AsyncIterator[tuple[FrameWriter, Stream]]:
    stream = Stream()
    stream.is_open.set()
    writer = FrameWriter(
        cast(AttachStream, stream), WELCOME, Load().read, MonotonicClock(),
        max_pending_tokens=1000, load_interval_s=load_interval_s, tokenizer=None, kv=KVFeed(1000).cursor(),
    )  # fmt: skip
    running = asyncio.create_task(writer.run())
    try:
        yield writer, stream
    finally:
        writer.stop()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


def step(index: int) -> TokenColumns:
    columns = TokenColumns()
    for attempt in (7, 8):
        columns.append(attempt, index, 10 * attempt + index, None)
    return columns


async def test_steps_of_the_same_rows_go_by_their_token_ids_on_each_stream_anew() -> None:
    for _ in range(2):
        async with running_writer() as (writer, stream):
            for index in range(3):
                writer.send(step(index), ())
                await stream.until(lambda stream, index=index: len(stream.frames) > index)  # type: ignore[misc]
        tokens = [frame.tokens for frame in stream.frames]
        assert [pb.same_rows for pb in tokens] == [False, True, True]
        decoder = TokenBatchDecoder()
        assert [list(decoder.decode(pb).first_indices) for pb in tokens] == [[0, 0], [1, 1], [2, 2]]


async def test_steps_that_a_busy_stream_makes_one_frame_of_are_sent_with_their_rows() -> None:
    async with running_writer() as (writer, stream):
        writer.send(step(0), ())
        await stream.until(lambda stream: len(stream.frames) == 1)
        stream.is_open.clear()
        writer.send(step(1), ())
        await stream.until(lambda stream: stream.num_writes == 2)
        for index in (2, 3):
            writer.send(step(index), ())
        stream.is_open.set()
        await stream.until(lambda stream: len(stream.frames) == 3)
        writer.send(step(4), ())
        await stream.until(lambda stream: len(stream.frames) == 4)
    decoder = TokenBatchDecoder()
    batches = [decoder.decode(frame.tokens) for frame in stream.frames]
    assert [list(batch.attempts) for batch in batches] == [[7, 8], [7, 8], [7, 8, 7, 8], [7, 8]]
    assert [list(batch.first_indices) for batch in batches] == [[0, 0], [1, 1], [2, 2, 3, 3], [4, 4]]
    said = [token_id for batch in batches for token_id in batch.token_ids]
    assert said == [10 * attempt + index for index in range(5) for attempt in (7, 8)]


async def test_a_load_that_is_due_rides_with_the_next_step() -> None:
    async with running_writer(load_interval_s=0.5) as (writer, stream):
        writer.send(step(0), ())
        await stream.until(lambda stream: len(stream.frames) == 1)
        writer.load_changed()
        await asyncio.sleep(0.52)  # due for 20 ms, and nobody has taken it along
        assert len(stream.frames) == 1
        writer.send(step(1), ())
        await stream.until(lambda stream: len(stream.frames) == 2)
    assert [frame.HasField("load") for frame in stream.frames] == [True, True]


async def test_a_load_that_nothing_takes_along_goes_by_itself_once() -> None:
    async with running_writer(load_interval_s=0.02) as (writer, stream):
        writer.send(step(0), ())
        await stream.until(lambda stream: len(stream.frames) == 1)
        writer.load_changed()
        await stream.until(lambda stream: len(stream.frames) == 2)
        await asyncio.sleep(0.1)
    assert [frame.HasField("load") for frame in stream.frames] == [True, True]
    assert not stream.frames[1].HasField("tokens")
