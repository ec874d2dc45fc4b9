"""Queues of device work that wait for one another: the seam between the block mover and CUDA streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from kvrelay.engine.cuda.copy_stream import Mark


class CopyQueue(Protocol):
    """What is enqueued runs in its order, whatever other queues do. The engine thread's."""

    def enqueue(self, operation: Callable[[], None], after: Iterable[Mark | None]) -> Mark | None:
        """Run `operation` after those points of other queues; returns the point at which it is done.
        Never waits on the host."""
        ...


class CudaCopyQueue:
    """A stream: one of its own, or whichever is the calling thread's current one."""

    def __init__(self, device: torch.device, *, is_current: bool) -> None:
        self._device = device
        self._own = None if is_current else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def enqueue(self, operation: Callable[[], None], after: Iterable[Mark | None]) -> Mark:
        stream = self._own or torch.cuda.current_stream(self._device)
        for mark in after:
            if mark is not None:
                stream.wait_event(mark)
        with torch.cuda.stream(stream):
            operation()
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(stream)
        return done


class InlineCopyQueue:
    """For a CPU device: everything is done at once."""

    def enqueue(self, operation: Callable[[], None], after: Iterable[Mark | None]) -> None:
        operation()
