"""The official `openai` package, unmodified, against a whole cluster of real processes with a real model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from kvrelay.client import AsyncClient
from kvrelay.core.cluster_view import ClusterState
from kvrelay.engine.embedded_model import ensure_smollm2
from tests.openai_proxy.running_services import RunningUp, running_up

SETTLE_TIMEOUT_S = 120.0
QUESTION = "Name three rivers."
Ask = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder need the cluster and its model."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.model)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return ensure_smollm2()


@pytest.fixture(scope="session")
def up(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningUp]:
    """One cluster for all tests of a test process."""
    with running_up(tmp_path_factory.mktemp("up")) as running:
        yield running


@pytest.fixture(scope="session")
def client(up: RunningUp) -> Iterator[OpenAI]:
    with OpenAI(base_url=up.base_url, api_key="not asked for", max_retries=0, timeout=300) as made:
        yield made


@pytest.fixture
async def async_client(up: RunningUp) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=up.base_url, api_key="not asked for", max_retries=0, timeout=300) as made:
        yield made


@pytest.fixture(scope="session")
def model(client: OpenAI) -> str:
    """The name of the model that is served."""
    (only,) = client.models.list().data
    return only.id


def greedy(model: str, question: str | list[Any] = QUESTION, **fields: Any) -> dict[str, Any]:
    """Fields of a chat request whose answer is always the same."""
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    return {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0, **fields}


@pytest.fixture(scope="session")
def ask(client: OpenAI, model: str) -> Callable[..., ChatCompletion]:
    """Ask for a chat completion in one piece."""

    def ask(question: str | list[Any] = QUESTION, **fields: Any) -> ChatCompletion:
        return client.chat.completions.create(**greedy(model, question, **fields))

    return ask


@dataclass
class Streamed:
    """What the chunks of a chat completion add up to, by choice."""

    chunks: list[ChatCompletionChunk]
    pieces: dict[int, list[str]] = field(default_factory=dict)
    calls: dict[int, dict[int, dict[str, str]]] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for chunk in self.chunks:
            for choice in chunk.choices:
                assert choice.index not in self.finish_reasons, "a choice goes on after its end"
                self._add(choice)

    def _add(self, choice: Any) -> None:
        if choice.delta.content:
            self.pieces.setdefault(choice.index, []).append(choice.delta.content)
        for call in choice.delta.tool_calls or ():
            known = self.calls.setdefault(choice.index, {})
            if call.id:
                assert call.index not in known, "a call begins twice"
                known[call.index] = {"id": call.id, "name": call.function.name, "arguments": ""}
            known[call.index]["arguments"] += call.function.arguments or ""
        if choice.finish_reason:
            self.finish_reasons[choice.index] = choice.finish_reason

    def text(self, index: int = 0) -> str:
        return "".join(self.pieces.get(index, ()))


@pytest.fixture(scope="session")
def ask_streamed(client: OpenAI, model: str) -> Callable[..., Streamed]:
    """Ask for a chat completion as a stream, and read all of it."""

    def ask(question: str | list[Any] = QUESTION, **fields: Any) -> Streamed:
        with client.chat.completions.create(stream=True, **greedy(model, question, **fields)) as stream:
            return Streamed(list(stream))

    return ask


@pytest.fixture
async def kvrelay_client(up: RunningUp) -> AsyncIterator[AsyncClient]:
    async with AsyncClient([up.router]) as made:
        yield made


@pytest.fixture
def wait_for_state(kvrelay_client: AsyncClient) -> Callable[..., Any]:
    """Wait until a state of the cluster fulfils a condition."""

    async def wait(what: str, condition: Callable[[ClusterState], bool]) -> None:
        state: ClusterState | None = None
        try:
            async with asyncio.timeout(SETTLE_TIMEOUT_S):
                async for state in kvrelay_client.watch_cluster(interval_s=0.1):
                    if condition(state):
                        return
        except TimeoutError:
            raise AssertionError(f"not seen: {what}; last state: {state}") from None

    return wait


@pytest.fixture(scope="session")
def hf_tokenizer(smollm2: Path) -> Any:
    """Hugging Face's own tokenizer of the model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def token_id_of(hf_tokenizer: Any) -> Callable[[str], str]:
    """The id of a text that is one token, as `logit_bias` wants it."""

    def find(text: str) -> str:
        (token_id,) = hf_tokenizer.encode(text, add_special_tokens=False)
        return str(token_id)

    return find
