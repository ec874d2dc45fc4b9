"""What tokenizing costs a client, and for how long it holds up an event loop. SmolLM2's tokenizer.

A conversation that grows turn by turn, rendered and tokenized anew each time, with the ids of known parts
kept and without, in turns, best of `--rounds`; then the longest that an event loop stood still while
`--prompts` prompts of `--chars` characters were tokenized one after the other, on it and on threads.

    python -m benchmarks.client_tokenize [--json] [--turns 20] [--chars 100000] [--prompts 10] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from random import Random

from kvrelay.client import ModelTokenizer
from kvrelay.client.tokenizing import Tokenizing
from kvrelay.engine.embedded_model import ensure_smollm2
from kvrelay.node.tokenizer_bundle import build_tokenizer_bundle

WORDS = "the of and to in that is was for on are with as his they at be this from have or by one had not but"
TICK_S = 0.001
CHARS_PER_TURN = 1500


@dataclass(frozen=True, slots=True)
class Measured:
    """Times in milliseconds. `conversation`: all turns together. `stall`: the longest lateness of a tick;
    `idle` is that of a loop with nothing else to do, the noise of the machine."""

    num_turns: int
    conversation_whole_ms: float
    conversation_by_parts_ms: float
    last_turn_whole_ms: float
    last_turn_by_parts_ms: float
    ratio: float
    last_turn_ratio: float
    prompt_chars: int
    stall_idle_ms: float
    stall_on_loop_ms: float
    stall_on_threads_ms: float


def prose(num_chars: int, rng: Random) -> str:
    words = WORDS.split()
    return " ".join(
        rng.choice(words) + rng.choice(["", ",", f" {rng.randrange(999)}"]) for _ in range(num_chars)
    )[:num_chars]


def conversation(num_turns: int) -> list[dict[str, object]]:
    """Of questions and answers, after a system prompt."""
    rng = Random(1)
    messages: list[dict[str, object]] = [{"role": "system", "content": prose(4 * CHARS_PER_TURN, rng)}]
    for _ in range(num_turns):
        messages.append({"role": "user", "content": prose(CHARS_PER_TURN // 5, rng)})
        messages.append({"role": "assistant", "content": prose(CHARS_PER_TURN, rng)})
    return messages


def turn_ms(tokenizer: ModelTokenizer, messages: list[dict[str, object]], salt: bytes) -> list[float]:
    """Of each turn: what its prompt takes, from messages to ids."""
    taken_ms = []
    for num_messages in range(2, len(messages), 2):
        start_ns = time.perf_counter_ns()
        tokenizer.encode_chat(messages[:num_messages], cache_salt=salt)
        taken_ms.append((time.perf_counter_ns() - start_ns) / 1e6)
    return taken_ms


async def stall_ms(work: Callable[[], Awaitable[None]]) -> float:
    """The longest that a tick was late while `work` went on."""
    late_s = 0.0

    async def tick() -> None:
        nonlocal late_s
        while True:
            due_s = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            late_s = max(late_s, time.perf_counter() - due_s)

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(10 * TICK_S)
    await work()
    await asyncio.sleep(10 * TICK_S)
    ticker.cancel()
    return late_s * 1e3


async def stalls_ms(
    tokenizer: ModelTokenizer, num_chars: int, num_prompts: int
) -> tuple[float, float, float]:
    """Of an idle loop, of one that tokenizes, and of one that leaves that to threads."""
    prompts = [prose(num_chars, Random(number)) for number in range(num_prompts)]
    tokenizing = Tokenizing(2, max_waiting=num_prompts)

    async def idle() -> None:
        await asyncio.sleep(0.02 * num_prompts)

    async def on_loop() -> None:
        for prompt in prompts:
            tokenizer.encode(prompt, cache_salt=b"on loop")
            await asyncio.sleep(2 * TICK_S)

    async def on_threads() -> None:
        for prompt in prompts:
            await tokenizing.encode(tokenizer, prompt, cache_salt=b"on threads")
            await asyncio.sleep(2 * TICK_S)

    try:
        return await stall_ms(idle), await stall_ms(on_loop), await stall_ms(on_threads)
    finally:
        tokenizing.close()


def measure(num_turns: int, num_chars: int, num_prompts: int, num_rounds: int) -> Measured:
    bundle = build_tokenizer_bundle(ensure_smollm2())
    assert bundle is not None
    by_parts, whole = ModelTokenizer(bundle), ModelTokenizer(bundle, max_cache_bytes=0)
    messages = conversation(num_turns)
    assert by_parts.encode_chat(messages, cache_salt=b"check") == whole.encode_chat(messages)
    rounds = [
        (turn_ms(whole, messages, b""), turn_ms(by_parts, messages, b"%d" % number))
        for number in range(num_rounds)
    ]
    whole_ms, parts_ms = (min((turns[side] for turns in rounds), key=sum) for side in (0, 1))
    idle_ms, on_loop_ms, on_threads_ms = asyncio.run(stalls_ms(by_parts, num_chars, num_prompts))
    return Measured(
        num_turns=num_turns,
        conversation_whole_ms=round(sum(whole_ms), 2),
        conversation_by_parts_ms=round(sum(parts_ms), 2),
        last_turn_whole_ms=round(whole_ms[-1], 3),
        last_turn_by_parts_ms=round(parts_ms[-1], 3),
        ratio=round(sum(whole_ms) / sum(parts_ms), 1),
        last_turn_ratio=round(whole_ms[-1] / parts_ms[-1], 1),
        prompt_chars=num_chars,
        stall_idle_ms=round(idle_ms, 2),
        stall_on_loop_ms=round(on_loop_ms, 2),
        stall_on_threads_ms=round(on_threads_ms, 2),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--chars", type=int, default=100_000)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    measured = measure(options.turns, options.chars, options.prompts, options.rounds)
    if options.json:
        print(json.dumps(asdict(measured)))
        return
    for name, value in asdict(measured).items():
        print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
