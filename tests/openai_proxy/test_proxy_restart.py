"""A proxy's end and its beginning: no request on its way is lost, and it is ready when it can serve."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn

from kvrelay.client import AsyncClient
from kvrelay.client.model_tokenizer import ModelTokenizer
from kvrelay.core.cluster_view import ModelInfo
from kvrelay.core.errors import ConfigError, RouterUnavailable
from kvrelay.node.pulse import Pulse
from kvrelay.node.sd_notify import Notifier
from kvrelay.openai_proxy.access import Access
from kvrelay.openai_proxy.app import make_app
from kvrelay.openai_proxy.config import ProxyConfig
from kvrelay.openai_proxy.draining_server import DrainingServer
from kvrelay.openai_proxy.life_signs import LifeBoard, keep_board, keep_pulse, until_servable
from kvrelay.openai_proxy.listening import listen
from kvrelay.openai_proxy.metrics import ProxyMetrics
from kvrelay.openai_proxy.usage_board import UsageBoard
from tests.client.fake_router import FakeRouter, ScriptedCall


class _Server(DrainingServer):
    """Leaves the signals of the tests' process alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass
class RunningProxy:
    base_url: str
    server: DrainingServer
    serving: asyncio.Task[None]
    stopping: asyncio.Event


@pytest.fixture
async def proxy(router: FakeRouter, monkeypatch, tmp_path: Path) -> AsyncIterator[RunningProxy]:
    monkeypatch.setenv("KVRELAY_CACHE", str(tmp_path / "cache"))
    app = make_app(ProxyConfig(routers=(router.address,)), Access((), UsageBoard(0)), ProxyMetrics())
    stopping = asyncio.Event()
    config = uvicorn.Config(app, http="httptools", lifespan="on", log_config=None)
    server = _Server(config, app, 60.0, stopping.set)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        yield RunningProxy(f"http://127.0.0.1:{listening.getsockname()[1]}", server, serving, stopping)
        server.should_exit = True
        await serving


async def test_a_request_over_an_idle_connection_is_answered_while_the_proxy_ends(proxy) -> None:
    async with httpx.AsyncClient(base_url=proxy.base_url) as caller:
        first = await caller.get("/v1/models")
        assert "connection" not in first.headers
        proxy.server.should_exit = True
        await proxy.stopping.wait()
        last = await caller.get("/v1/models")  # httpx does not ask again if its connection is closed
        assert last.status_code == 200
        assert last.headers["connection"] == "close"
        await proxy.serving


async def test_a_connection_whose_answer_began_before_the_end_takes_one_more_request(proxy, router) -> None:
    """Its caller was not told that the connection ends."""
    may_end = asyncio.Event()

    async def answer(call: ScriptedCall) -> None:
        await call.tokens(65)
        await may_end.wait()
        await call.finish()

    router.script = answer
    body = {"prompt": "x", "max_tokens": 1, "stream": True}
    async with httpx.AsyncClient(base_url=proxy.base_url) as caller:
        async with caller.stream("POST", "/v1/completions", json=body) as stream:
            proxy.server.should_exit = True
            await proxy.stopping.wait()
            may_end.set()
            assert "[DONE]" in (await stream.aread()).decode()
        assert (await caller.get("/v1/models")).headers["connection"] == "close"
    await proxy.serving


async def test_a_proxy_that_ends_accepts_nobody_any_more(proxy) -> None:
    async with httpx.AsyncClient(base_url=proxy.base_url) as caller:
        await caller.get("/v1/models")
        proxy.server.should_exit = True
        await proxy.serving
        with pytest.raises(httpx.ConnectError):
            await caller.get("/v1/models")


def test_a_socket_for_another_process_is_left_alone() -> None:
    config = ProxyConfig(host="127.0.0.1", port=0)
    with listen(config, {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1"}) as own:
        assert own.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("number", ["0", "2", "many"])
def test_only_one_socket_can_be_handed_over(number: str) -> None:
    with pytest.raises(ConfigError, match="one listening socket"):
        listen(ProxyConfig(), {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": number})


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            listen(ProxyConfig(host="127.0.0.1", port=port), {})


@pytest.fixture
async def client(router: FakeRouter, monkeypatch, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    monkeypatch.setenv("KVRELAY_CACHE", str(tmp_path / "cache"))
    async with AsyncClient([router.address]) as made:
        yield made


async def test_a_proxy_is_servable_once_a_model_and_its_tokenizer_are_there(
    router, client, monkeypatch
) -> None:
    monkeypatch.setattr("kvrelay.openai_proxy.life_signs._RETRY_S", 0.0)
    answers = iter([RouterUnavailable("none answers yet"), (), router.models])

    async def list_models() -> tuple[ModelInfo, ...]:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(client, "list_models", list_models)
    fetched = []
    fetch = client.tokenizer

    async def tokenizer(model: str) -> ModelTokenizer:
        fetched.append(model)
        return await fetch(model)

    monkeypatch.setattr(client, "tokenizer", tokenizer)
    await until_servable(client)
    assert next(answers, None) is None, "it was servable before a model was served"
    assert fetched == ["tiny"]


async def test_a_lone_worker_says_itself_when_it_is_ready(client) -> None:
    pulse = Pulse(Notifier("/nobody/listens"), lambda: 0.0, lambda: "well")
    keeping = asyncio.create_task(keep_pulse(pulse, client))
    async with asyncio.timeout(30):
        while not pulse.is_ready:  # noqa: ASYNC110 - nothing else says so
            await asyncio.sleep(0)
    keeping.cancel()


async def test_workers_are_ready_when_all_are_and_as_alive_as_the_quietest(client, monkeypatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr("kvrelay.openai_proxy.life_signs.time.monotonic", lambda: now_s)
    board = LifeBoard(2)
    assert board.stuck_for_s() == 0.0
    board.beat(0)
    assert not board.are_all_ready
    now_s = 1007.0
    board.beat(1)
    assert board.are_all_ready
    assert board.stuck_for_s() == 7.0
    board.forget(0)
    assert not board.are_all_ready, "who takes its place has not begun"
    assert board.stuck_for_s() == 0.0


async def test_a_worker_beats_on_the_board_once_it_can_serve(client) -> None:
    board = LifeBoard(1)
    keeping = asyncio.create_task(keep_board(board, 0, 0.01, client))
    async with asyncio.timeout(30):
        while not board.are_all_ready:  # noqa: ASYNC110 - nothing else says so
            await asyncio.sleep(0)
    keeping.cancel()
