"""What waits to be written to one node: commands, merged into one frame per write, bounded."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from kvrelay.core.node_messages import Command, ReserveDecode, RouterFrame, SendPrefix, StartPrefill

MAX_BYTES_PER_FRAME: Final = 10_000_000
"""Of requests in one frame, so that a frame of many fits gRPC's message limit."""


class NodeOutbox:
    """One writer takes; anyone on the loop puts."""

    def __init__(self, max_buffered_commands: int) -> None:
        self._max_buffered_commands = max_buffered_commands
        self._commands: deque[Command] = deque()
        self._is_heartbeat_due = False
        self._is_closed = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, command: Command) -> bool:
        """False: it did not fit, because the node does not read."""
        if len(self._commands) >= self._max_buffered_commands:
            return False
        self._commands.append(command)
        self._wake()
        return True

    def put_heartbeat(self) -> None:
        """Have a frame written, be it empty."""
        self._is_heartbeat_due = True
        self._wake()

    def close(self) -> None:
        """Let the writer end; what still waits is dropped."""
        self._is_closed = True
        self._wake()

    async def take(self) -> RouterFrame | None:
        """The next frame, once there is something to say; None after `close`."""
        while not self._is_closed and not self.has_news:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return None if self._is_closed else self.take_now()

    @property
    def has_news(self) -> bool:
        """Whether there is something to say."""
        return bool(self._commands) or self._is_heartbeat_due

    def take_now(self) -> RouterFrame:
        """The next frame, be it empty."""
        self._is_heartbeat_due = False
        return RouterFrame(tuple(self._take_commands()))

    def _take_commands(self) -> list[Command]:
        taken: list[Command] = []
        num_bytes = 0
        while self._commands:
            command = self._commands[0]
            num_bytes += _message_bytes(command)
            if taken and num_bytes > MAX_BYTES_PER_FRAME:
                break
            taken.append(self._commands.popleft())
        return taken

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _message_bytes(command: Command) -> int:
    """At most so many bytes are what the command carries, but for some hundred."""
    match command:
        case StartPrefill() | ReserveDecode():
            return command.request.max_message_bytes
        case SendPrefix():
            return command.prefix.max_message_bytes
        case _:
            return 0
