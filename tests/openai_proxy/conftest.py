"""What tests of the proxy share: a parser's answer, and a proxy in this process before a scripted router."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest
import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kvrelay.core.cluster_view import ModelInfo
from kvrelay.core.tokenizer_chunk import tokenizer_digest
from kvrelay.openai_proxy.access import Access, ApiKey
from kvrelay.openai_proxy.app import make_app
from kvrelay.openai_proxy.config import ProxyConfig
from kvrelay.openai_proxy.metrics import ProxyMetrics
from kvrelay.openai_proxy.tool_calls.events import CallArguments, CallStarted, Text, ToolParser
from kvrelay.openai_proxy.usage_board import UsageBoard
from tests.client.fake_router import FakeRouter

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ tools | tojson if tools }}[assistant]"
)

Answer = tuple[str, list[tuple[str, str]]]
"""The words of an answer, and its calls: name and arguments."""


def parse(parser: ToolParser, parts: Sequence[str]) -> Answer:
    """What a parser makes of an answer that comes in these parts; checks that its events make sense."""
    words, calls = "", []
    for event in [*(event for part in parts for event in parser.push(part)), *parser.finish()]:
        match event:
            case Text(text):
                assert text, "an empty event says nothing"
                words += text
            case CallStarted(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case CallArguments(index, json_text):
                assert json_text
                assert index == len(calls) - 1, "arguments belong to the last call"
                calls[index] = (calls[index][0], calls[index][1] + json_text)
    return words, calls


@pytest.fixture(name="parse")
def parse_fixture() -> Callable[[ToolParser, Sequence[str]], Answer]:
    return parse


@pytest.fixture(scope="session")
def bundle() -> bytes:
    """A tokenizer of one token a byte, and one that ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    content = {"tokenizer": json.loads(made.to_str()), "chat_template": CHAT_TEMPLATE}
    return zlib.compress(json.dumps(content).encode())


@pytest.fixture
async def router(bundle: bytes) -> AsyncIterator[FakeRouter]:
    """Serves the model ``tiny``; what it answers is up to the test."""
    made = FakeRouter()
    await made.start()
    made.models = (ModelInfo("tiny", 4096, 512, (256,), tokenizer_digest(bundle), 1, 1),)
    made.bundles = {"tiny": bundle}
    yield made
    await made.kill()


class _Server(uvicorn.Server):
    """Leaves the signals of the tests' process alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


StartProxy = Callable[..., Awaitable[httpx.AsyncClient]]


@pytest.fixture
async def start_proxy(
    router: FakeRouter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[StartProxy]:
    """``start_proxy(keys=(), **settings)``: a client of a proxy that listens on a port of its own."""
    monkeypatch.setenv("KVRELAY_CACHE", str(tmp_path / "cache"))
    async with contextlib.AsyncExitStack() as stack:

        async def start(keys: Sequence[ApiKey] = (), **settings: object) -> httpx.AsyncClient:
            config = ProxyConfig(routers=(router.address,), **settings)  # type: ignore[arg-type]
            app = make_app(config, Access(keys, UsageBoard(len(keys))), ProxyMetrics())
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            server = _Server(
                uvicorn.Config(
                    app, http="httptools", lifespan="on", log_config=None, timeout_graceful_shutdown=1
                )
            )
            serving = asyncio.create_task(server.serve(sockets=[listening]))

            async def stop() -> None:
                server.should_exit = True
                await serving

            stack.push_async_callback(stop)
            base_url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            return await stack.enter_async_context(httpx.AsyncClient(base_url=base_url, timeout=30.0))

        yield start
