"""What the client library costs per streamed token: many readers in one process, fed by a made-up router.

The messages are ready-made bytes; parsing them, the mailboxes, the text and the waking of each reader are
measured, gRPC's own work is not. CPU time of this process, all threads.

    python -m benchmarks.client_stream [--json] [--streams 256] [--steps 200]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random
from typing import Any, cast

import uvloop
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kvrelay.client.config import ClientConfig
from kvrelay.client.generation import Generation, GenerationParts
from kvrelay.client.generation_ask import GenerationAsk, PreparedCall
from kvrelay.client.generation_stream import GenerationStream
from kvrelay.client.in_flight import InFlight
from kvrelay.client.model_tokenizer import ModelTokenizer
from kvrelay.client.output_text import OutputText
from kvrelay.client.session import Session
from kvrelay.client.stop_strings import StopStrings
from kvrelay.codec.client_api import encode_session_update
from kvrelay.core.client_types import GenerateCall, SessionUpdate
from kvrelay.core.request import TokenLogprobs, TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.v1 import router_pb2

TEXT = (
    "The quick brown fox, größer als 3 Füchse, jumps over the lazy dog — 日本語のテキスト 🦊 and on it goes. "
)
NUM_LOGPROBS = 5
STOPS = ("\n\nUser:", "</answer>", "fox over", "###")
"""None of them comes; one nearly does."""


class FakeCall:
    """A `Session` call whose answers are `messages`, once every reader has started; each is handed out when
    the event loop has dealt with the one before."""

    def __init__(self, messages: list[bytes], num_streams: int) -> None:
        self._messages = messages
        self._num_missing = num_streams
        self._started = asyncio.Event()
        self.ended = asyncio.Event()
        self.cpu_s = 0.0

    async def write(self, ask: router_pb2.SessionRequest) -> None:
        self._num_missing -= len(ask.generate)
        if not self._num_missing:
            self._started.set()

    def cancel(self) -> None:
        self._started.set()

    async def __aiter__(self) -> AsyncIterator[router_pb2.SessionResponse]:
        await self._started.wait()
        began_s = time.process_time()
        for message in self._messages:
            yield router_pb2.SessionResponse.FromString(message)
            for _ in range(4):  # until all readers have had their turn
                await asyncio.sleep(0)
        self.cpu_s = time.process_time() - began_s
        self.ended.set()
        await asyncio.Event().wait()


class FakeRouters:
    """A `RouterSet` of the one session."""

    addresses = ("fake:1",)
    address = "fake:1"

    def __init__(self, call: FakeCall) -> None:
        self.one_session = Session(cast("Any", call), self.address, time.monotonic)

    async def connect(self, *, last: str = "") -> FakeRouters:
        return self

    def session(self) -> Session:
        return self.one_session

    def mark_well(self, address: str) -> None:
        pass


def make_tokenizer() -> ModelTokenizer:
    """Byte-level, as most models' are; words of several tokens, characters of several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    bundle = {"tokenizer": json.loads(tokenizer.to_str())}
    return ModelTokenizer(zlib.compress(json.dumps(bundle).encode()))


def make_messages(
    token_ids: tuple[int, ...], args: argparse.Namespace, num_logprobs: int | None
) -> list[bytes]:
    """One token for every stream in each, the streams at different places of the same text."""
    stream_ids = list(range(1, args.streams + 1))
    top = tuple((rank, -1.5 - rank) for rank in range(num_logprobs or 0))
    logprobs = [TokenLogprobs(-0.5, top)] * args.streams if num_logprobs is not None else []
    return [
        encode_session_update(
            SessionUpdate(
                stream_ids,
                [1] * args.streams,
                [token_ids[(step + stream_id) % len(token_ids)] for stream_id in stream_ids],
                list(logprobs),
            )
        ).SerializeToString()
        for step in range(args.steps)
    ]


async def read_all(parts: GenerationParts, ask: GenerationAsk, num_tokens: int) -> None:
    stream = GenerationStream(Generation(ask, parts))
    async for chunk in stream:
        num_tokens -= len(chunk.token_ids)
        if not num_tokens:
            break


async def measure(
    args: argparse.Namespace,
    tokenizer: ModelTokenizer,
    *,
    has_text: bool = True,
    stops: tuple[str, ...] = (),
    num_logprobs: int | None = None,
) -> float:
    """CPU microseconds per token."""
    call = FakeCall(make_messages(tokenizer.encode(TEXT), args, num_logprobs), args.streams)
    sampling = SamplingParams(max_tokens=1 << 20, num_logprobs=num_logprobs)
    request = TokenRequest((1, 2, 3), 3, sampling)

    async def prepare(ask: GenerationAsk) -> PreparedCall:
        text = OutputText(
            tokenizer.detokenizer() if has_text else None, StopStrings(stops) if stops else None
        )
        return PreparedCall(GenerateCall(ask.request_id, "bench", request), text)

    routers = FakeRouters(call)

    async def cancel_leftover(_address: str, _request_id: str) -> None:
        return

    parts = GenerationParts(
        cast("Any", routers),
        ClientConfig(),
        Random(1),
        InFlight(args.streams),
        time.monotonic,
        prepare,
        cancel_leftover,
    )
    ask = GenerationAsk(request.token_ids, sampling=sampling)
    await asyncio.gather(*(read_all(parts, ask, args.steps) for _ in range(args.streams)))
    await call.ended.wait()
    await routers.one_session.close()
    return call.cpu_s / (args.streams * args.steps) * 1e6


def rows(args: argparse.Namespace) -> dict[str, Callable[[], Awaitable[float]]]:
    tokenizer = make_tokenizer()
    return {
        "token_ids": lambda: measure(args, tokenizer, has_text=False),
        "text": lambda: measure(args, tokenizer),
        "text_and_stops": lambda: measure(args, tokenizer, stops=STOPS),
        "text_and_logprobs": lambda: measure(args, tokenizer, num_logprobs=NUM_LOGPROBS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = {f"{name}_us_per_token": runner.run(row()) for name, row in rows(args).items()}
    if args.json:
        print(json.dumps(figures))
        return
    print(f"{args.streams} streams of {args.steps} tokens, CPU of the client per token")
    for name, figure in figures.items():
        print(f"{name:32} {figure:8.2f}")


if __name__ == "__main__":
    main()
