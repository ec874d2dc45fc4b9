"""Bursts: everything leaves once, in order, however often the connection is full."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvrelay.openai_proxy.burst_writer import Burst, BurstWriter
from kvrelay.openai_proxy.eager import start_now


class Connection:
    """Takes bodies while it is open."""

    def __init__(self) -> None:
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.bodies: list[bytes] = []

    async def send(self, message: Any) -> None:
        if not self.is_open.is_set():
            await self.is_open.wait()
        self.bodies.append(message["body"])


async def test_events_of_one_pass_leave_together() -> None:
    connection, burst = Connection(), Burst()
    writer = BurstWriter(connection.send, burst)
    assert writer.write(b"a") is None
    assert writer.write(b"b") is None
    assert connection.bodies == []
    await asyncio.sleep(0)
    assert connection.bodies == [b"ab"]
    assert writer.write(b"c") is None
    await writer.drain()
    assert connection.bodies == [b"ab", b"c"]


async def test_a_full_connection_makes_its_own_stream_wait_and_no_other() -> None:
    slow, quick, burst = Connection(), Connection(), Burst()
    first, second = BurstWriter(slow.send, burst), BurstWriter(quick.send, burst)
    slow.is_open.clear()
    first.write(b"1")
    second.write(b"1")
    await asyncio.sleep(0)
    assert (slow.bodies, quick.bodies) == ([], [b"1"])
    pending = first.write(b"2")
    assert pending is not None
    waiting = asyncio.ensure_future(pending)
    assert second.write(b"2") is None
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiting.done()
    slow.is_open.set()
    await waiting
    assert (slow.bodies, quick.bodies) == ([b"1", b"2"], [b"1", b"2"])


async def test_what_sending_raises_reaches_its_own_stream() -> None:
    async def broken(message: Any) -> None:
        raise ConnectionError("gone")

    good, burst = Connection(), Burst()
    bad, well = BurstWriter(broken, burst), BurstWriter(good.send, burst)
    bad.write(b"x")
    well.write(b"x")
    await asyncio.sleep(0)
    assert good.bodies == [b"x"]
    with pytest.raises(ConnectionError, match="gone"):
        bad.write(b"y")
    with pytest.raises(ConnectionError, match="gone"):
        await bad.drain()


async def test_start_now_runs_up_to_the_first_wait_and_goes_on_when_awaited() -> None:
    steps: list[str] = []
    gate = asyncio.Event()

    async def work() -> None:
        steps.append("begun")
        await gate.wait()
        await asyncio.sleep(0)
        steps.append("over")

    rest = start_now(work())
    assert steps == ["begun"]
    assert rest is not None
    waiting = asyncio.ensure_future(rest)
    gate.set()
    await waiting
    assert steps == ["begun", "over"]


async def test_a_cancelled_rest_cancels_the_work() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    rest = start_now(work())
    assert rest is not None
    waiting = asyncio.ensure_future(rest)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended == ["cancelled"]


async def test_work_that_fails_at_once_raises_at_once() -> None:
    async def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        start_now(work())
