"""The loop of the one thread that owns transport, sockets and staging memory.

Commands come from other threads through a bounded inbox. The thread sleeps until a socket, a command or
a deadline wakes it; only while something needs polling does it poll, with growing pauses, which a socket or
a command ends.
"""

from __future__ import annotations

import logging
import select
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

_MAX_COMMANDS: Final = 65536
_FIRST_PAUSE_S: Final = 20e-6
_MAX_PAUSE_S: Final = 500e-6
_PAUSE_GROWTH: Final = 1.1
_MAX_SELECTABLE: Final = 1024
_PAUSELESS_POLLS: Final = 20

_log = logging.getLogger(__name__)


class ReactorClient(Protocol):
    """What runs on the reactor's thread."""

    def begin(self) -> None:
        """Called once, first; nothing else is called when it raises."""
        ...

    def turn(self, now_s: float) -> bool:
        """Do what is due, briefly; returns whether there may be more to do at once."""
        ...

    def is_polling(self, now_s: float) -> bool:
        """Whether `turn` must be called again soon though nothing wakes the thread."""
        ...

    def spin_s(self) -> float:
        """How long to poll without pauses after the last thing that happened."""
        ...

    def wait_s(self, now_s: float) -> float | None:
        """How long to sleep at most; None: until woken."""
        ...

    def end(self) -> None:
        """Called once, after the last turn; commands may still come, and must do no more than report."""
        ...

    def crashed(self, error: BaseException) -> None:
        """A bug: `turn` or a callback raised. `end` follows."""
        ...


class Reactor:
    """Runs a `ReactorClient` on a thread of its own; is the `Watcher` of its sockets."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._selector = selectors.DefaultSelector()
        self._selector_fd = _fd_of(self._selector)
        self._inbox: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._has_ended = False
        self._on_stopped: Callable[[], None] = _nothing
        self._waker, self._wakened = socket.socketpair()
        self._is_awake = False
        self._is_stopping = False
        self._thread: threading.Thread | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._num_quiet = 0
        self._quiet_since_s = 0.0
        self._waker.setblocking(False)
        self._wakened.setblocking(False)
        self._selector.register(self._wakened, selectors.EVENT_READ, self._on_wake)

    def start(self, client: ReactorClient, on_started: Callable[[BaseException | None], None]) -> None:
        """Start the thread, which calls `on_started` with what `client.begin` raised, if anything."""
        self._thread = threading.Thread(
            target=self._run, args=(client, on_started), name=self._name, daemon=True
        )
        self._thread.start()

    def stop(self, on_stopped: Callable[[], None]) -> None:
        """Have the thread run its inbox, end, and call `on_stopped`; `join` is quick after that."""
        self._on_stopped = on_stopped
        with self._lock:
            has_ended = self._has_ended
            self._is_stopping = True
        if has_ended:
            on_stopped()
        else:
            self._wake()

    def join(self) -> None:
        """Wait for the thread to end and free the reactor's own resources."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._selector.close()
        self._waker.close()
        self._wakened.close()

    def post(self, command: Callable[[], None], *, may_refuse: bool = False) -> bool:
        """Have the thread run `command`; thread-safe and never blocks.

        Returns False when the thread has ended, or `may_refuse` and the inbox is full.
        """
        with self._lock:
            if self._has_ended or (may_refuse and len(self._inbox) >= _MAX_COMMANDS):
                return False
            self._inbox.append(command)
        if not self._is_awake:
            self._is_awake = True  # as good as: one byte is enough to wake it
            self._wake()
        return True

    def watch(self, sock: socket.socket, events: int, callback: Callable[[int], None]) -> None:
        if sock in self._selector.get_map():
            self._selector.modify(sock, events, callback)
        else:
            self._selector.register(sock, events, callback)

    def unwatch(self, sock: socket.socket) -> None:
        try:
            self._selector.unregister(sock)
        except (KeyError, ValueError):
            return

    def _wake(self) -> None:
        try:
            self._waker.send(b"\0")
        except (BlockingIOError, OSError):
            return  # the pipe is full, so the thread wakes anyway; or it is closed

    def _on_wake(self, _events: int) -> None:
        try:
            while self._wakened.recv(4096):
                pass
        except BlockingIOError:
            return

    def _run(self, client: ReactorClient, on_started: Callable[[BaseException | None], None]) -> None:
        try:
            client.begin()
        except BaseException as error:
            self._has_ended = True
            on_started(error)
            return
        on_started(None)
        try:
            while not self._is_stopping:
                self._turn(client)
            self._run_commands()
        except BaseException as error:
            _log.critical("the KV transfer thread failed", exc_info=True)
            client.crashed(error)
        client.end()
        with self._lock:
            self._has_ended = True
        self._run_commands()
        self._on_stopped()

    def _turn(self, client: ReactorClient) -> None:
        was_busy = self._run_commands()
        was_busy |= client.turn(time.monotonic())
        now_s = time.monotonic()
        if was_busy or self._inbox:
            self._num_quiet = 0
            self._select(0.0)
        elif client.is_polling(now_s):
            if self._select(0.0):
                self._num_quiet = 0
            else:
                self._pause(now_s, client.spin_s())
        else:
            self._num_quiet = 0
            self._select(client.wait_s(now_s))

    def _pause(self, now_s: float, spin_s: float) -> None:
        """Give the processor away, for longer the longer nothing happens."""
        if self._num_quiet == 0:
            self._quiet_since_s = now_s
            self._pause_s = _FIRST_PAUSE_S
        self._num_quiet += 1
        if self._num_quiet < _PAUSELESS_POLLS or now_s - self._quiet_since_s < spin_s:
            time.sleep(0.0)
        else:
            self._select_briefly(self._pause_s)
            self._pause_s = min(self._pause_s * _PAUSE_GROWTH, _MAX_PAUSE_S)

    def _select_briefly(self, timeout_s: float) -> None:
        """Until something is ready: unlike most selectors this does not round up to milliseconds."""
        self._is_awake = False
        if not self._inbox:
            if 0 <= self._selector_fd < _MAX_SELECTABLE:
                select.select([self._selector_fd], [], [], timeout_s)
            else:
                time.sleep(timeout_s)
        self._is_awake = True

    def _select(self, timeout_s: float | None) -> bool:
        self._is_awake = False
        if self._inbox:
            timeout_s = 0.0
        ready = self._selector.select(timeout_s)
        self._is_awake = True
        for key, events in ready:
            key.data(events)
        return bool(ready)

    def _run_commands(self) -> bool:
        num_commands = len(self._inbox)
        for _ in range(num_commands):
            self._inbox.popleft()()
        return num_commands > 0


def _fd_of(selector: selectors.BaseSelector) -> int:
    """What is readable while a watched socket is ready; -1 where the selector has no such thing."""
    fileno = getattr(selector, "fileno", None)
    return -1 if fileno is None else int(fileno())


def _nothing() -> None:
    return
