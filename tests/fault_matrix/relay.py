"""A link that can be broken: a TCP relay in front of one port."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from typing import Final, Self

_PIECE_BYTES: Final = 4096
_RESET: Final = struct.pack("ii", 1, 0)


class _Gate:
    """One direction of a relay: how many bytes may still pass."""

    def __init__(self) -> None:
        self.num_passed_bytes = 0
        self.num_waiting_bytes = 0
        self._room_bytes: int | None = None
        self._changed = asyncio.Event()

    def hold_after(self, num_bytes: int) -> None:
        self._room_bytes = num_bytes

    def open(self) -> None:
        self._room_bytes = None
        self._changed.set()

    async def pass_through(self, num_bytes: int) -> None:
        """Returns when so many bytes may go on."""
        self.num_waiting_bytes += num_bytes
        try:
            while self._room_bytes is not None and self._room_bytes < num_bytes:
                self._changed.clear()
                await self._changed.wait()
        finally:
            self.num_waiting_bytes -= num_bytes
        if self._room_bytes is not None:
            self._room_bytes -= num_bytes
        self.num_passed_bytes += num_bytes


class Relay:
    """Listens on one address and passes everything on to another, both ways, until it is told otherwise.

    `forth` is the direction of who dialled, `back` the other. `cut` resets what is open, and whatever is
    dialled until `mend`.
    """

    def __init__(self) -> None:
        self.forth = _Gate()
        self.back = _Gate()
        self._target = ("", 0)
        self._server: asyncio.Server | None = None
        self._is_cut = False
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def port(self) -> int:
        """What it listens on."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def holds_back(self) -> bool:
        """Whether bytes wait here that came after others had passed: a message is under way."""
        return self.forth.num_passed_bytes > 0 and self.forth.num_waiting_bytes > 0

    async def listen(self, host: str) -> Self:
        """Take a free port of that address."""
        self._server = await asyncio.start_server(self._on_connection, host, 0, limit=_PIECE_BYTES)
        return self

    def lead_to(self, host: str, port: int) -> None:
        """Where new connections lead."""
        self._target = (host, port)

    def hold_forth(self, after_bytes: int) -> None:
        """Let so many more bytes pass in the direction of who dialled, then none; the way back stays open."""
        self.forth.num_passed_bytes = 0
        self.forth.hold_after(after_bytes)

    def silence(self) -> None:
        """Let nothing pass any more, in either direction, and keep all connections."""
        self.forth.hold_after(0)
        self.back.hold_after(0)

    def let_pass(self) -> None:
        """What waits goes on."""
        self.forth.open()
        self.back.open()

    def cut(self) -> None:
        """Reset every connection; new ones are reset as they come."""
        self._is_cut = True
        for writer in list(self._open):
            _reset(writer)

    def mend(self) -> None:
        """New connections are relayed again, and nothing is held."""
        self._is_cut = False
        self.let_pass()

    async def close(self) -> None:
        """End everything."""
        self.cut()
        self.let_pass()
        if self._server is not None:
            self._server.close()

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            _reset(writer)
            return
        self._open.add(writer)
        try:
            onward = await asyncio.open_connection(*self._target, limit=_PIECE_BYTES)
        except OSError:
            self._open.discard(writer)
            _reset(writer)
            return
        self._open.add(onward[1])
        pumps = [
            asyncio.create_task(_pump(reader, onward[1], self.forth)),
            asyncio.create_task(_pump(onward[0], writer, self.back)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            for end in (writer, onward[1]):
                self._open.discard(end)
                end.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: _Gate) -> None:
    with suppress(OSError):
        while piece := await reader.read(_PIECE_BYTES):
            await gate.pass_through(len(piece))
            writer.write(piece)
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the peer is told at once, and finds no orderly end."""
    found = writer.get_extra_info("socket")
    if found is not None:
        with suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
