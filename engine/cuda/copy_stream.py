"""Where copies of KV run beside the engine's own work: the one seam between the KV store and CUDA streams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeAlias

import torch

Mark: TypeAlias = Any
"""A point in a stream (``torch.cuda.Event``), which a later copy waits for."""


class CopyStream(Protocol):
    """`mark` is the engine thread's; everything else the transfer thread's."""

    def adopt_thread(self) -> None:
        """Make the device current on the calling thread."""
        ...

    def mark(self) -> Mark | None:
        """The point that the calling thread's current stream has reached in its queue."""
        ...

    def copying(self, after: Iterable[Mark | None]) -> AbstractContextManager[None]:
        """What is queued inside runs after those points, and is complete when the block ends."""
        ...

    def settle(self) -> None:
        """Wait for all that was queued on the device."""
        ...


class CudaCopyStream:
    """A stream of high priority, so that a message need not wait behind a whole forward pass."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def adopt_thread(self) -> None:
        torch.cuda.set_device(self._device)
        torch.cuda.synchronize(self._device)  # the first true call: now the thread has the context

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def copying(self, after: Iterable[Mark | None]) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            for mark in after:
                if mark is not None:
                    self._stream.wait_event(mark)
            yield
            self._done.record(self._stream)
        self._done.synchronize()  # spins, without the interpreter lock

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)


class InlineCopyStream:
    """For a CPU device: everything is complete at once."""

    def adopt_thread(self) -> None:
        return

    def mark(self) -> Mark | None:
        return None

    @contextmanager
    def copying(self, after: Iterable[Mark | None]) -> Iterator[None]:
        yield

    def settle(self) -> None:
        return
