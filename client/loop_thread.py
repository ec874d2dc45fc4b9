"""An event loop on a thread of its own, for code that blocks."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import TypeVar

from kvrelay.core.errors import RequestCancelled

T = TypeVar("T")


class LoopThread:
    """Runs until `close`, at the latest until the interpreter exits."""

    def __init__(self, name: str) -> None:
        self._closing = threading.Lock()
        self._is_closed = False
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=_serve, args=(started,), name=name, daemon=True)
        self._thread.start()
        self._loop, stop = started.result()
        # Neither the thread nor this holds a reference to us: dropping an unclosed client ends its thread.
        self._close = weakref.finalize(self, _stop, self._thread, self._loop, stop)

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Call `work` on the loop and wait for its outcome. Interrupting the wait (Ctrl-C) cancels it.

        Raises:
            RequestCancelled: the thread has been closed.
        """
        assert threading.current_thread() is not self._thread, "would wait for itself"
        future = self._submit(work)
        try:
            return future.result()
        except CancelledError:
            raise RequestCancelled("the client was closed") from None
        except BaseException:
            future.cancel()
            raise

    def call_soon(self, function: Callable[[], None]) -> None:
        """Call it on the loop; nothing happens once that is closed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """End the loop, cancelling what runs on it, and the thread. May be called again."""
        with self._closing:
            self._is_closed = True
        self._close()

    def _submit(self, work: Callable[[], Awaitable[T]]) -> Future[T]:
        # Under the lock, so that the loop sees every task before it is told to stop, and cancels it then.
        with self._closing:
            if self._is_closed:
                raise RequestCancelled("the client was closed")
            return asyncio.run_coroutine_threadsafe(_call(work), self._loop)


async def _call(work: Callable[[], Awaitable[T]]) -> T:
    return await work()


def _serve(started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    async def until_stopped() -> None:
        stop = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), stop))
        await stop.wait()

    asyncio.run(until_stopped())


def _stop(thread: threading.Thread, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(stop.set)
    if threading.current_thread() is not thread:
        thread.join()
