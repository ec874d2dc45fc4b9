"""What a session writes: everything that gathered, in one message, but never too large a one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvrelay.client import Grammar, GrammarKind, SamplingParams
from kvrelay.client.mailbox import Mailbox
from kvrelay.client.session import Session
from kvrelay.codec.client_api import decode_session_ask, encode_session_ask
from kvrelay.core.client_types import GenerateCall, SessionAsk
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import MAX_GRAMMAR_BYTES


class FakeStream:
    """A `Session` call that keeps what is written, and whose writes wait for `gate`."""

    def __init__(self) -> None:
        self.asks: list[SessionAsk] = []
        self.gate = asyncio.Event()
        self.ended = asyncio.Event()

    async def write(self, pb: Any) -> None:
        self.asks.append(decode_session_ask(pb))
        await self.gate.wait()

    def cancel(self) -> None:
        self.ended.set()

    async def __aiter__(self) -> AsyncIterator[Any]:
        await self.ended.wait()
        for nothing in ():
            yield nothing


@pytest.fixture
def stream() -> FakeStream:
    return FakeStream()


@pytest.fixture
async def session(stream: FakeStream) -> AsyncIterator[Session]:
    made = Session(stream, "fake:1", lambda: 0.0)  # type: ignore[arg-type]
    yield made
    await made.close()


def a_call(num_tokens: int = 1) -> GenerateCall:
    return GenerateCall("r", "", TokenRequest((1,) * num_tokens, num_tokens, SamplingParams()))


async def settle() -> None:
    """Let the session's writer run until it has nothing left to do."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_what_gathers_during_a_write_goes_out_as_one(session: Session, stream: FakeStream) -> None:
    first = session.start(a_call(), Mailbox(10))
    await settle()
    others = [session.start(a_call(), Mailbox(10)) for _ in range(20)]
    session.cancel(first)
    await settle()
    assert len(stream.asks) == 1
    stream.gate.set()
    await settle()
    assert len(stream.asks) == 2
    assert [stream_id for stream_id, _ in stream.asks[1].calls] == others
    assert stream.asks[1].cancel == (first,)


async def test_what_is_cancelled_before_it_was_sent_is_never_sent(
    session: Session, stream: FakeStream
) -> None:
    session.cancel(session.start(a_call(), Mailbox(10)))
    kept = session.start(a_call(), Mailbox(10))
    stream.gate.set()
    await settle()
    assert [[stream_id for stream_id, _ in ask.calls] for ask in stream.asks] == [[kept]]
    assert stream.asks[0].cancel == ()


async def test_large_prompts_do_not_share_a_message(session: Session, stream: FakeStream) -> None:
    stream.gate.set()
    for num_tokens in (400_000, 400_000, 50_000, 50_000, 1):
        session.start(a_call(num_tokens), Mailbox(10))
    await settle()
    assert [len(ask.calls) for ask in stream.asks] == [1, 3, 1]


async def test_large_grammars_and_many_biases_do_not_share_a_message(
    session: Session, stream: FakeStream
) -> None:
    stream.gate.set()
    grammar = Grammar(GrammarKind.REGEX, "a" * MAX_GRAMMAR_BYTES)
    logit_bias = tuple((2**31 - 1 - index, 1.0) for index in range(1024))
    sampling = SamplingParams(grammar=grammar, logit_bias=logit_bias)
    for _ in range(100):
        session.start(GenerateCall("r", "", TokenRequest((1,), 1, sampling)), Mailbox(10))
    await settle()
    assert sum(len(ask.calls) for ask in stream.asks) == 100
    assert max(encode_session_ask(ask).ByteSize() for ask in stream.asks) < 4 << 20


async def test_many_calls_are_spread_over_messages(session: Session, stream: FakeStream) -> None:
    stream.gate.set()
    for _ in range(600):
        session.start(a_call(), Mailbox(10))
    await settle()
    assert [len(ask.calls) for ask in stream.asks] == [256, 256, 88]
