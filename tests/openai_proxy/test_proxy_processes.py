"""A proxy as processes: several workers share a port, die and are replaced, and stop when told to."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from kvrelay.core.request import FinishReason
from kvrelay.openai_proxy.access import ApiKey, hash_key, key_as_toml

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
PATIENCE_S = 60.0
COMMAND = (
    "import kvrelay.openai_proxy.main as main; main.MIN_LIFE_S = {min_life_s}\n"
    "from kvrelay.cli.main import main; main()"
)


@dataclass
class Proxy:
    """A running `kvrelay proxy`."""

    process: subprocess.Popen[bytes]
    url: str

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    @asynccontextmanager
    async def only(self, worker: psutil.Process) -> AsyncIterator[None]:
        """While the others stand still, that worker has to answer."""
        others = [other for other in self.workers() if other.pid != worker.pid]
        for other in others:
            other.suspend()
        try:
            yield
        finally:
            for other in others:
                other.resume()

    async def ask(
        self, method: str = "POST", path: str = "/v1/chat/completions", **more: Any
    ) -> httpx.Response:
        """On a connection of its own."""
        if method == "POST":
            more = {"json": CHAT, **more}
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            return await client.request(method, self.url + path, **more)

    async def figure(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = (await self.ask("GET", "/metrics")).text
        return sum(map(float, re.findall(rf"^{name}(?:{{.*}})? ([0-9.e+]+)$", text, re.MULTILINE)))

    async def ended(self) -> int:
        return await asyncio.wait_for(asyncio.to_thread(self.process.wait), PATIENCE_S)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what another process does."""
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def spawn(command: list[str], ready: Path, min_life_s: float) -> subprocess.Popen[bytes]:
    code = COMMAND.format(min_life_s=min_life_s)
    environ = {**os.environ, "TMPDIR": str(ready.parent)}
    return subprocess.Popen([sys.executable, "-c", code, *command, "--ready-file", str(ready)], env=environ)


@pytest.fixture
def start(router: Any, tmp_path: Path) -> Iterator[Callable[..., Awaitable[Proxy]]]:
    started: list[subprocess.Popen[bytes]] = []

    async def start_proxy(*arguments: str, min_life_s: float = 0.0) -> Proxy:
        ready = tmp_path / "ready.json"
        command = ["proxy", "--router", router.address, "--host", "127.0.0.1", "--port", "0", *arguments]
        process = spawn(command, ready, min_life_s)
        started.append(process)

        async def is_ready() -> bool:
            assert process.poll() is None, "it ended by itself"
            return ready.exists()

        await until(is_ready)
        proxy = Proxy(process, f"http://{json.loads(ready.read_text())['http_address']}")
        assert (await proxy.ask("GET", "/health")).status_code == 200
        return proxy

    router.script = say_ok
    yield start_proxy
    for process in started:
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        process.kill()
        process.wait()
        for child in children:
            if child.is_running():
                child.kill()


async def say_ok(call: Any) -> None:
    await call.tokens(1)
    await call.finish(FinishReason.STOP)


async def hang(call: Any) -> None:
    await call.tokens(1)
    await call.wait_cancelled()


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_proxy_stops_in_order(
    start: Any, workers: str, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    proxy = await start("--workers", workers)
    children = proxy.workers()
    proxy.process.send_signal(number)
    assert await proxy.ended() == 0
    assert not psutil.wait_procs(children, timeout=PATIENCE_S)[1]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
async def test_sigterm_lets_a_running_stream_end_and_takes_no_new_one(
    start: Any, router: Any, workers: int
) -> None:
    may_end = asyncio.Event()

    async def script(call: Any) -> None:
        await call.tokens(1, 2)
        await may_end.wait()
        await call.tokens(3)
        await call.finish(FinishReason.STOP)

    async def is_refused() -> bool:
        try:
            await proxy.ask("GET", "/health")
        except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError):
            return True
        return False

    router.script = script
    proxy = await start("--workers", str(workers))
    text = ""
    async with (
        httpx.AsyncClient(timeout=PATIENCE_S) as client,
        client.stream("POST", f"{proxy.url}/v1/chat/completions", json={**CHAT, "stream": True}) as response,
    ):
        parts = response.aiter_text()
        text += await anext(parts)
        proxy.process.send_signal(signal.SIGTERM)
        await until(is_refused)
        may_end.set()
        text += "".join([part async for part in parts])
    assert text.endswith("data: [DONE]\n\n")
    assert '"$"' in text, "the token that came after SIGTERM"
    assert await proxy.ended() == 0


async def test_a_stream_that_outlasts_the_drain_is_cut_and_cancelled(start: Any, router: Any) -> None:
    router.script = hang
    proxy = await start("--drain-timeout-s", "1")
    async with (
        httpx.AsyncClient(timeout=PATIENCE_S) as client,
        client.stream("POST", f"{proxy.url}/v1/chat/completions", json={**CHAT, "stream": True}),
    ):
        proxy.process.send_signal(signal.SIGTERM)
        await router.calls[0].wait_cancelled()
        assert await proxy.ended() == 0


async def test_every_worker_answers_and_figures_add_up_over_all(start: Any, router: Any) -> None:
    proxy = await start("--workers", "2")
    before = await proxy.figure("kvrelay_proxy_answers_total")
    for number, worker in enumerate(proxy.workers(), 1):
        async with proxy.only(worker):
            for _ in range(number):
                assert (await proxy.ask()).status_code == 200
            assert await proxy.figure("kvrelay_proxy_answers_total") - before == number * (number + 1) / 2
    assert await proxy.figure("kvrelay_proxy_requests_running") == 1, "this one itself"


async def test_a_killed_worker_is_replaced_and_what_it_did_is_no_longer_running(
    start: Any, router: Any
) -> None:
    proxy = await start("--workers", "2")
    victim, other = proxy.workers()
    async with proxy.only(victim):
        assert (await proxy.ask()).status_code == 200
        router.script = hang
        asking = asyncio.create_task(proxy.ask())
        await router.wait_calls(2)
    victim.kill()
    with pytest.raises(httpx.TransportError):
        await asking
    await router.calls[1].wait_cancelled()
    router.script = say_ok

    async def is_replaced() -> bool:
        pids = {worker.pid for worker in proxy.workers() if worker.status() != psutil.STATUS_ZOMBIE}
        return len(pids) == 2 and victim.pid not in pids

    await until(is_replaced)
    (successor,) = [worker for worker in proxy.workers() if worker.pid != other.pid]
    async with proxy.only(successor):
        assert (await proxy.ask()).status_code == 200
        assert await proxy.figure("kvrelay_proxy_requests_running") == 1
        assert await proxy.figure("kvrelay_proxy_answers_total") == 2, "the dead worker's answer still counts"


async def test_a_worker_that_dies_at_once_ends_the_proxy(start: Any) -> None:
    proxy = await start("--workers", "2", min_life_s=3600)
    survivors = proxy.workers()
    survivors.pop().kill()
    assert await proxy.ended() == 1
    assert not psutil.wait_procs(survivors, timeout=PATIENCE_S)[1]


async def test_workers_let_their_streams_end_and_leave_when_their_supervisor_was_killed(
    start: Any, router: Any
) -> None:
    may_end = asyncio.Event()

    async def script(call: Any) -> None:
        await call.tokens(1)
        await may_end.wait()
        await call.finish(FinishReason.STOP)

    router.script = script
    proxy = await start("--workers", "2")
    workers = proxy.workers()
    asking = asyncio.create_task(proxy.ask())
    await router.wait_calls(1)
    proxy.process.kill()
    await proxy.ended()
    may_end.set()
    assert (await asking).status_code == 200
    assert not (await asyncio.to_thread(psutil.wait_procs, workers, PATIENCE_S))[1]


async def test_a_keys_limit_holds_over_all_workers(start: Any, router: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(key_as_toml(ApiKey("ada", hash_key("kvr-x"), max_concurrent=1)))
    headers = {"authorization": "Bearer kvr-x"}
    proxy = await start("--workers", "2", "--keys-file", str(keys))
    assert (await proxy.ask()).status_code == 401
    router.script = hang
    first, second = proxy.workers()
    async with proxy.only(first):
        asking = asyncio.create_task(proxy.ask(headers=headers))
        await router.wait_calls(1)
    async with proxy.only(second):
        assert (await proxy.ask(headers=headers)).status_code == 429
    asking.cancel()
    await router.calls[0].wait_cancelled()
    router.script = say_ok

    async def has_room() -> bool:
        return bool((await proxy.ask(headers=headers)).status_code == 200)

    await until(has_room)
