"""What one side of `kv_handoff_gpu` measures: stores, transports and frames that keep the time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvrelay.core.ids import BlockId
from kvrelay.core.kv import CopyUnderWay, DeviceKind, StagingMemory
from kvrelay.engine.cuda.kv_store import CudaKVStore
from kvrelay.engine.cuda.staging import CudaStaging
from kvrelay.kv_transfer.connection import Connection
from kvrelay.kv_transfer.frame_reader import FrameReader
from kvrelay.kv_transfer.messages import Frame
from kvrelay.kv_transfer.transport import TransportContext, TransportEvent, WriteCompleted
from kvrelay.kv_transfer.ucx import UCXTransport


class Timeline:
    """Events of this process, by `time.perf_counter`, which the processes of one host share on Linux."""

    def __init__(self) -> None:
        self.is_on = False
        self.events: list[tuple[float, str]] = []

    def add(self, text: str) -> None:
        if self.is_on:
            self.events.append((time.perf_counter(), text))


class BusyTime:
    """The seconds in which at least one of something was under way, and the events of each."""

    def __init__(self, timeline: Timeline, what: str) -> None:
        self.seconds = 0.0
        self._timeline = timeline
        self._what = what
        self._num_under_way = 0
        self._since_s = 0.0

    def begin(self, text: str) -> None:
        self._timeline.add(f"{self._what} begins: {text}")
        if self._num_under_way == 0:
            self._since_s = time.perf_counter()
        self._num_under_way += 1

    def end(self, text: str) -> None:
        self._timeline.add(f"{self._what} is done: {text}")
        self._num_under_way -= 1
        if self._num_under_way == 0:
            self.seconds += time.perf_counter() - self._since_s

    def take(self) -> float:
        """The seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@dataclass(slots=True)
class TimedCopy:
    """Notes when the owner thread sees that the copy is done."""

    copy: CopyUnderWay
    busy: BusyTime
    text: str
    is_over: bool = False

    @property
    def num_bytes(self) -> int:
        return self.copy.num_bytes

    def is_done(self) -> bool:
        if not self.is_over and self.copy.is_done():
            self._end()
        return self.is_over

    def wait(self) -> int:
        self.copy.wait()
        if not self.is_over:
            self._end()
        return self.num_bytes

    def _end(self) -> None:
        self.is_over = True
        self.busy.end(self.text)


class TimedStore:
    """A store whose copies are timed from being queued until they are seen to be done."""

    def __init__(self, store: CudaKVStore, timeline: Timeline) -> None:
        self.store = store
        self.layout = store.layout
        self.gathers = BusyTime(timeline, "gather")
        self.scatters = BusyTime(timeline, "scatter")
        self._timeline = timeline

    @property
    def device_kind(self) -> DeviceKind:
        return self.store.device_kind

    def allocate_staging(self, num_bytes: int) -> CudaStaging:
        return self.store.allocate_staging(num_bytes)

    def gather(
        self, table: Sequence[BlockId], layers: range, tokens: range, out: StagingMemory, offset: int
    ) -> TimedCopy:
        text = f"layers {layers} tokens {tokens}"
        self.gathers.begin(text)
        copy = TimedCopy(self.store.gather(table, layers, tokens, out, offset), self.gathers, text)
        self._timeline.add("gather is queued")
        return copy

    def scatter(
        self, table: Sequence[BlockId], layers: range, tokens: range, source: StagingMemory, offset: int
    ) -> TimedCopy:
        text = f"layers {layers} tokens {tokens}"
        self.scatters.begin(text)
        copy = TimedCopy(self.store.scatter(table, layers, tokens, source, offset), self.scatters, text)
        self._timeline.add("scatter is queued")
        return copy


class TimedTransport:
    """UCX, and the seconds in which at least one write was under way."""

    def __init__(self, context: TransportContext, timeline: Timeline) -> None:
        self.inner = UCXTransport(context)
        self.writes = BusyTime(timeline, "write")
        self._timeline = timeline

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def post_write(self, link_id: int, local_offset: int, remote_offset: int, num_bytes: int) -> int:
        self.writes.begin(f"{num_bytes} bytes")
        write_id = self.inner.post_write(link_id, local_offset, remote_offset, num_bytes)
        self._timeline.add(f"write {write_id} is posted")
        return write_id

    def poll(self) -> Sequence[TransportEvent]:
        events = self.inner.poll()
        for event in events:
            if isinstance(event, WriteCompleted):
                self.writes.end(str(event.write_id))
        return events


def record_frames(timeline: Timeline) -> None:
    """From now on, every control frame that this process sends or reads is an event."""
    send, feed = Connection.send, FrameReader.feed

    def recorded_send(connection: Connection, *frames: Frame) -> None:
        for frame in frames:
            timeline.add(f"-> {type(frame).__name__}")
        send(connection, *frames)

    def recorded_feed(reader: FrameReader, received: bytes) -> list[Frame]:
        frames = feed(reader, received)
        for frame in frames:
            timeline.add(f"<- {type(frame).__name__}")
        return frames

    Connection.send = recorded_send  # type: ignore[method-assign]
    FrameReader.feed = recorded_feed  # type: ignore[method-assign]


def timeline_lines(events: dict[str, list[tuple[float, str]]]) -> list[str]:
    """The sides' events in one order, with microseconds since the first `push_ready`."""
    merged = sorted((at_s, side, text) for side, found in events.items() for at_s, text in found)
    zero_s = next(at_s for at_s, _, text in merged if text.startswith("push_ready"))
    return [f"{(at_s - zero_s) * 1e6:10.1f} us  {side:8s}  {text}" for at_s, side, text in merged]
