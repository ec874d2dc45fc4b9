"""Where copies of KV run beside the engine's own work: the one seam between the KV store and CUDA streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeAlias

import torch

Mark: TypeAlias = Any
"""A point in a stream (``torch.cuda.Event``), which a later copy waits for."""


class CopyEnd(Protocol):
    """The point behind a copy in its stream."""

    def is_done(self) -> bool:
        """Whether the device has passed it; never blocks."""
        ...

    def wait(self) -> None:
        """Return when the device has passed it."""
        ...


class CopyStream(Protocol):
    """`mark` is the engine thread's; everything else the transfer thread's."""

    def adopt_thread(self) -> None:
        """Make the device current on the calling thread."""
        ...

    def mark(self) -> Mark | None:
        """The point that the calling thread's current stream has reached in its queue."""
        ...

    def has_passed(self, mark: Mark) -> bool:
        """Whether the device has passed that point; never blocks."""
        ...

    def run(self, copy: Callable[[], None], after: Iterable[Mark]) -> CopyEnd:
        """Have what `copy` queues run behind those points, which may be another device's."""
        ...

    def launch(self, copy: Callable[[int], None], after: Iterable[Mark]) -> CopyEnd:
        """As `run`, for a copy that takes the stream's handle and needs no stream to be current."""
        ...

    def settle(self) -> None:
        """Wait for all that was queued on the device."""
        ...


class CudaCopyStream:
    """A stream of high priority, so that a message need not wait behind a whole forward pass."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._as_current = torch.cuda.stream(self._stream)
        self._idle_events: list[torch.cuda.Event] = []

    def adopt_thread(self) -> None:
        torch.cuda.set_device(self._device)
        torch.cuda.synchronize(self._device)  # the first true call: now the thread has the context

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def has_passed(self, mark: Mark) -> bool:
        return bool(mark.query())

    def run(self, copy: Callable[[], None], after: Iterable[Mark]) -> CopyEnd:
        with self._as_current:
            for mark in after:
                self._stream.wait_event(mark)
            copy()
            return self._end()

    def launch(self, copy: Callable[[int], None], after: Iterable[Mark]) -> CopyEnd:
        for mark in after:
            self._stream.wait_event(mark)
        copy(self._stream.cuda_stream)
        return self._end()

    def _end(self) -> CopyEnd:
        events = self._idle_events
        event = events.pop() if events else torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return _EventEnd(event, events)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)


class _EventEnd:
    """Gives its event back for the next copy once the device has passed it."""

    __slots__ = ("_event", "_idle_events")

    def __init__(self, event: torch.cuda.Event, idle_events: list[torch.cuda.Event]) -> None:
        self._event: torch.cuda.Event | None = event
        self._idle_events = idle_events

    def is_done(self) -> bool:
        if self._event is None:
            return True
        if not self._event.query():  # type: ignore[no-untyped-call]
            return False
        self._give_back(self._event)
        return True

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()  # without the interpreter lock
            self._give_back(self._event)

    def _give_back(self, event: torch.cuda.Event) -> None:
        self._event = None
        self._idle_events.append(event)


class InlineCopyStream:
    """For a CPU device: everything is complete at once."""

    def adopt_thread(self) -> None:
        return

    def mark(self) -> Mark | None:
        return None

    def has_passed(self, mark: Mark) -> bool:
        return True

    def run(self, copy: Callable[[], None], after: Iterable[Mark]) -> CopyEnd:
        copy()
        return PASSED

    def launch(self, copy: Callable[[int], None], after: Iterable[Mark]) -> CopyEnd:
        raise NotImplementedError("there is no stream to launch on")

    def settle(self) -> None:
        return


class _Passed:
    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        return


PASSED: CopyEnd = _Passed()
"""The end of a copy that was done when it was begun."""
