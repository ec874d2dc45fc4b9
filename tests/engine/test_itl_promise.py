"""With an ITL promise, decodes keep their pace while prompts are prefilled beside them, in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from random import Random

import pytest

from kvrelay.core.errors import ConfigError
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.config import EngineConfig, EngineKind
from kvrelay.engine.interface import SequenceKey
from kvrelay.engine.sim.engine import SimEngine
from kvrelay.engine.sim.timing import SimTiming

NUM_STREAMS = 8
BLOCK_SIZE = 16
BUDGET = 8192
LEARNING_STEPS = 30


class VirtualTime:
    """Passes when an engine sleeps, by the given time within some percent."""

    def __init__(self, seed: int, noise: float = 0.02) -> None:
        self.now_s = 0.0
        self._random, self._noise = Random(seed), noise

    def sleep(self, step_s: float) -> None:
        self.now_s += step_s * self._random.gauss(1.0, self._noise)

    def read(self) -> float:
        return self.now_s


@dataclass
class Measured:
    """Mixed steps after the first ones: their durations and prefill tokens."""

    steps_s: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return sum(self.num_tokens) / sum(self.steps_s)

    def share_within(self, limit_s: float) -> float:
        return sum(step_s <= limit_s for step_s in self.steps_s) / len(self.steps_s)


def sim_of(time: VirtualTime, **changes: object) -> SimEngine:
    settings: dict[str, object] = {
        "num_blocks": 4096,
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 2 * NUM_STREAMS,
        "max_num_batched_tokens": BUDGET,
        "max_model_len": 8192,
        **changes,
    }
    config = EngineConfig(model="m", engine=EngineKind.SIM, **settings)  # type: ignore[arg-type]
    return SimEngine(config, sleep=time.sleep, read_clock=time.read)


def prompts(seed: int, shortest: int, longest: int) -> Iterator[TokenRequest]:
    """Random tokens, one to be drawn."""
    random = Random(seed)
    while True:
        length = random.randint(shortest, longest)
        ids = tuple(random.choices(range(1, 30_000), k=length))
        yield TokenRequest(ids, length, SamplingParams(max_tokens=1, ignore_eos=True))


def start_streams(engine: SimEngine, num_streams: int = NUM_STREAMS) -> None:
    """Sequences that decode until the test is over."""
    for index in range(num_streams):
        ids = tuple(range(2 + index, 502 + index))
        sampling = SamplingParams(max_tokens=7000, ignore_eos=True)
        engine.submit(TokenRequest(ids, len(ids), sampling), SequenceKey(f"stream-{index}"))
    while len(engine.step().outputs) < num_streams:
        pass


def measure(
    time: VirtualTime, num_steps: int = 300, shortest: int = 2000, longest: int = 7000, **changes: object
) -> Measured:
    """Streams decode while two prompts always wait or run."""
    engine, measured = sim_of(time, **changes), Measured()
    start_streams(engine)
    numbers, waiting = count(), prompts(5, shortest, longest)
    num_open = 0
    for index in range(num_steps + LEARNING_STEPS):
        while num_open < 2:
            engine.submit(next(waiting), SequenceKey(f"prompt-{next(numbers)}"))
            num_open += 1
        began_s = time.now_s
        output = engine.step()
        if index % 10 == 0:
            engine.check()
        assert output.num_decode_tokens == NUM_STREAMS, "every stream decodes in every step"
        assert 0 < output.num_prefill_tokens <= BUDGET
        num_open -= sum(item.finish_reason is not None for item in output.outputs)
        if index >= LEARNING_STEPS:
            measured.steps_s.append(time.now_s - began_s)
            measured.num_tokens.append(output.num_prefill_tokens)
    return measured


def best_fixed(promise_s: float, run: Callable[[int], Measured]) -> Measured:
    """The fastest prefill with chunks of one size, 99 of 100 steps within the promise."""
    low, high = 1, BUDGET // BLOCK_SIZE
    best = run(BLOCK_SIZE)
    while low < high - 1:
        middle = (low + high) // 2
        measured = run(middle * BLOCK_SIZE)
        if measured.share_within(promise_s) >= 0.99:
            low, best = middle, measured
        else:
            high = middle
    return best


@pytest.mark.parametrize(("promise_ms", "longest"), [(12.0, 7000), (25.0, 7000), (50.0, 7000), (25.0, 2200)])
def test_decodes_keep_the_promise_and_prefill_is_as_fast_as_it_allows(promise_ms, longest):
    promised = measure(VirtualTime(1), longest=longest, itl_promise_ms=promise_ms)
    fixed = best_fixed(
        promise_ms / 1e3,
        lambda num_tokens: measure(
            VirtualTime(1), 100, longest=longest, max_num_batched_tokens=num_tokens + NUM_STREAMS
        ),
    )
    assert promised.share_within(promise_ms / 1e3) >= 0.99
    assert promised.tokens_per_s >= 0.8 * fixed.tokens_per_s


def test_without_the_promise_the_same_traffic_breaks_it():
    assert measure(VirtualTime(1), 50).share_within(0.050) < 0.5


def test_pauses_cost_their_own_steps_only():
    class PausingTime(VirtualTime):
        num_steps = 0

        def sleep(self, step_s: float) -> None:
            self.num_steps += 1
            super().sleep(step_s + (2.0 if self.num_steps in (2, 150) else 0.0))

    measured = measure(PausingTime(1), itl_promise_ms=25.0)
    assert sum(step_s > 0.025 for step_s in measured.steps_s) <= 1 + 0.01 * len(measured.steps_s)
    assert sum(measured.num_tokens[-100:]) > 100 * 400


def test_with_no_decode_running_the_whole_budget_is_used():
    time = VirtualTime(1)
    engine = sim_of(time, itl_promise_ms=10.0, max_num_batched_tokens=2048)
    request = next(prompts(1, 5000, 5000))
    engine.submit(request, SequenceKey("prompt"))
    assert [engine.step().num_prefill_tokens for _ in range(3)] == [2048, 2048, 904]
    start_streams(engine)
    engine.submit(next(prompts(2, 5000, 5000)), SequenceKey("beside streams"))
    assert engine.step().num_prefill_tokens < 100


@pytest.mark.parametrize("timing", [SimTiming(), SimTiming(decode_base_s=1.0)])
def test_an_impossible_promise_still_prefills_a_block_a_step(timing):
    engine = sim_of(VirtualTime(1), itl_promise_ms=0.001, sim_timing=timing)
    start_streams(engine)
    engine.submit(next(prompts(1, 400, 400)), SequenceKey("a"))
    engine.submit(next(prompts(2, 40, 40)), SequenceKey("b"))
    taken = [engine.step().num_prefill_tokens for _ in range(32)]
    assert sum(taken) == 440
    assert min(taken[1:27]) >= min(BLOCK_SIZE, 8)
    assert max(taken[2:]) <= BLOCK_SIZE, "what it has learnt, it keeps to"


def test_chunks_end_on_block_boundaries():
    engine = sim_of(VirtualTime(1), itl_promise_ms=20.0)
    start_streams(engine)
    engine.submit(next(prompts(1, 5003, 5003)), SequenceKey("a"))
    taken = []
    while sum(taken) < 5003:
        taken.append(engine.step().num_prefill_tokens)
    assert len(taken) > 5
    assert {num_tokens % BLOCK_SIZE for num_tokens in taken[:-1]} == {0}


def test_a_recomputed_sequence_is_limited_as_any_other_prefill():
    time = VirtualTime(1)
    engine = sim_of(time, itl_promise_ms=15.0, num_blocks=100, max_model_len=1600)
    for name, length, max_tokens in (("long", 900, 400), ("short", 300, 100), ("late", 300, 400)):
        request = next(prompts(max_tokens + length, length, length))
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        engine.submit(TokenRequest(request.token_ids, length, sampling), SequenceKey(name))
    num_late, num_mixed, num_tokens = 0, 0, 0
    while engine.has_work():
        began_s = time.now_s
        output = engine.step()
        engine.check()
        num_tokens += len(output.outputs)
        if output.num_prefill_tokens and output.num_decode_tokens:
            num_mixed += 1
            num_late += time.now_s - began_s > 0.015
    assert engine.load().num_preemptions > 0
    assert num_tokens == 900
    assert num_mixed > 0
    assert num_late <= 0.1 * num_mixed


@pytest.mark.parametrize("value", [0, -1.0, 60_001, float("nan"), float("inf"), True, "25"])
def test_a_promise_out_of_range_is_refused_by_name(value):
    with pytest.raises(ConfigError, match="itl_promise_ms"):
        EngineConfig(model="m", itl_promise_ms=value)


@pytest.mark.parametrize("value", [None, 0.5, 25, 60_000])
def test_a_promise_in_range_is_taken(value):
    assert EngineConfig(model="m", itl_promise_ms=value).itl_promise_ms == value
