"""Tokenizing does not hold up the event loop: what takes long goes to a bounded number of threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvrelay.client import AsyncClient, ClientConfig, ModelTokenizer, SamplingParams
from kvrelay.client.tokenizing import Tokenizing, is_quick_to_render
from kvrelay.core.errors import InvalidRequest, Overloaded, RequestCancelled

LONG = "the quick brown fox " * 500
PATIENCE_S = 30.0


class SpiedTokenizer(ModelTokenizer):
    """Notes on which threads it worked; may be held up."""

    def __init__(self, bundle: bytes) -> None:
        self.threads: list[threading.Thread] = []
        self.may_go = threading.Event()
        self.may_go.set()
        self.num_working = self.most_working = 0
        self._lock = threading.Lock()
        super().__init__(bundle)

    def _work(self) -> None:
        self.threads.append(threading.current_thread())
        with self._lock:
            self.num_working += 1
            self.most_working = max(self.most_working, self.num_working)
        assert self.may_go.wait(PATIENCE_S)
        with self._lock:
            self.num_working -= 1

    def encode(self, *args: Any, **options: Any) -> tuple[int, ...]:
        self._work()
        return super().encode(*args, **options)

    def render_chat(self, *args: Any, **options: Any) -> str:
        self._work()
        return super().render_chat(*args, **options)

    def decode(self, *args: Any, **options: Any) -> str:
        self._work()
        return super().decode(*args, **options)

    @property
    def num_off_loop(self) -> int:
        """Calls that another thread than the loop's did."""
        return sum(thread is not threading.main_thread() for thread in self.threads)


@pytest.fixture
def tokenizer(bundle: bytes) -> SpiedTokenizer:
    return SpiedTokenizer(bundle)


@pytest.fixture
def tokenizing() -> Iterator[Tokenizing]:
    made = Tokenizing(2, max_waiting=8)
    yield made
    made.close()


def turn(content: str) -> dict[str, object]:
    return {"role": "user", "content": content}


async def test_long_texts_are_tokenized_on_threads_and_short_ones_at_once(
    tokenizer: SpiedTokenizer, tokenizing: Tokenizing
) -> None:
    expected = tuple(tokenizer.tokenizer.encode(LONG).ids)
    assert await tokenizing.encode(tokenizer, LONG) == expected
    assert tokenizer.num_off_loop == 1
    assert await tokenizing.encode(tokenizer, LONG[:500]) == tuple(tokenizer.tokenizer.encode(LONG[:500]).ids)
    assert tokenizer.num_off_loop == 1


async def test_long_outputs_are_decoded_on_threads(tokenizer: SpiedTokenizer, tokenizing: Tokenizing) -> None:
    token_ids = tokenizer.tokenizer.encode(LONG * 2).ids
    assert await tokenizing.decode(tokenizer, token_ids) == LONG * 2
    assert tokenizer.num_off_loop == 1
    assert await tokenizing.decode(tokenizer, token_ids[:9]) == tokenizer.tokenizer.decode(token_ids[:9])
    assert tokenizer.num_off_loop == 1


async def test_conversations_of_much_are_rendered_on_threads(
    tokenizer: SpiedTokenizer, tokenizing: Tokenizing
) -> None:
    tools = [{"name": f"tool {number}", "parameters": {"x": ["y"] * 100}} for number in range(100)]
    plain = await tokenizing.encode_chat(tokenizer, [turn("hello")])
    assert tokenizer.num_off_loop == 0
    assert await tokenizing.encode_chat(tokenizer, [turn("hello")], tools=tools) == plain
    assert tokenizer.num_off_loop == 1, "the template ran on a thread, the short prompt did not need one"


@pytest.mark.parametrize(
    ("values", "is_quick"),
    [
        ([[turn("x" * 30_000)], None, None], True),
        ([[turn("x" * 33_000)], None, None], False),
        ([[turn("x")] * 3000, None, None], False),
        ([[], [{"a": {"b": [{"c": "x" * 33_000}]}}], {}], False),
        ([[turn("x")], [1, None, True, 2.5], {"day": "Monday"}], True),
    ],
)
def test_rendering_is_judged_by_the_size_of_all_that_a_template_may_show(
    values: list[Any], is_quick: bool
) -> None:
    assert is_quick_to_render(values) == is_quick


def test_a_value_that_holds_itself_is_judged_too() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert not is_quick_to_render(endless)


async def test_threads_are_bounded_and_so_is_what_waits_for_them(
    tokenizer: SpiedTokenizer, tokenizing: Tokenizing
) -> None:
    tokenizer.may_go.clear()
    waiting = [asyncio.create_task(tokenizing.encode(tokenizer, f"{number}{LONG}")) for number in range(8)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await tokenizing.encode(tokenizer, LONG)
    tokenizer.may_go.set()
    assert len(await asyncio.gather(*waiting)) == 8
    assert 1 <= tokenizer.most_working <= 2
    await tokenizing.encode(tokenizer, LONG)


async def test_closing_ends_what_waits_with_a_clear_error(
    tokenizer: SpiedTokenizer, tokenizing: Tokenizing
) -> None:
    tokenizer.may_go.clear()
    tasks = [asyncio.create_task(tokenizing.encode(tokenizer, f"{number}{LONG}")) for number in range(5)]
    await asyncio.sleep(0)
    tokenizing.close()
    for waits in tasks[2:]:
        with pytest.raises(RequestCancelled, match="closed"):
            await waits
    with pytest.raises(RequestCancelled, match="closed"):
        await tokenizing.encode(tokenizer, LONG)
    tokenizer.may_go.set()
    assert all(await asyncio.gather(*tasks[:2]))


async def test_a_cancelled_reader_stays_cancelled(tokenizer: SpiedTokenizer, tokenizing: Tokenizing) -> None:
    tokenizer.may_go.clear()
    task = asyncio.create_task(tokenizing.encode(tokenizer, LONG))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    tokenizer.may_go.set()


async def test_the_client_does_long_work_on_its_own_threads_and_ends_them(
    text_router: Any, config: ClientConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "kvrelay.client.model_catalog.ModelTokenizer", lambda bundle, **_: SpiedTokenizer(bundle)
    )
    async with AsyncClient(text_router.address, config=config) as client:
        tokenizer = await client.tokenizer()
        assert isinstance(tokenizer, SpiedTokenizer)
        token_ids = await client.tokenize(LONG)
        await client.tokenize_chat([turn(f"1{LONG}")])
        await client.detokenize(token_ids)
        await client.complete(f"2{LONG}", sampling=SamplingParams(max_tokens=1))
        await client.complete(messages=[turn(f"3{LONG}")], sampling=SamplingParams(max_tokens=1))
        threads = {thread for thread in tokenizer.threads if thread is not threading.main_thread()}
        assert tokenizer.num_off_loop == 5
        assert all(thread.name.startswith("kvrelay tokenizing") for thread in threads)
        assert len(threads) <= config.max_tokenizing_threads
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_half_a_surrogate_pair_in_a_tool_is_the_callers_fault(
    byte_level_tokenizer: Any, make_bundle: Any
) -> None:
    tokenizer = ModelTokenizer(make_bundle(byte_level_tokenizer, "{{ tools | tojson }}"))
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.encode_chat([turn("x")], tools=[{"name": "\ud800"}])
    assert caught.value.field == "messages"
