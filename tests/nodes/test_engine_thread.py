"""The engine's thread, over the simulated engine: outcomes arrive on the loop, in order, and it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
import pytest_asyncio

from kvrelay.core.ids import AttemptId, TransferId
from kvrelay.core.kv_events import KVChanges
from kvrelay.core.request import TokenRequest
from kvrelay.engine.config import EngineConfig, EngineKind
from kvrelay.engine.interface import EngineLoad, KVReady, SequenceKey, StepOutput
from kvrelay.engine.sim.engine import SimEngine
from kvrelay.engine.sim.timing import INSTANT
from kvrelay.node.engine_thread import EngineThread
from kvrelay.node.events import (
    EngineDied,
    EngineEvent,
    PrefillStarted,
    ReleaseSequence,
    ReserveSequence,
    SequenceRefused,
    SequenceReleased,
    SequenceReserved,
    StartDecode,
    StepFinished,
    SubmitPrefill,
)
from kvrelay.node.monotonic_clock import MonotonicClock

ONE = SequenceKey("1")
ID = TransferId(7, AttemptId(1))


class Recorder:
    """Keeps what the thread delivers."""

    def __init__(self) -> None:
        self.events: list[EngineEvent] = []
        self.load: EngineLoad | None = None
        self.kv_changes: list[KVChanges] = []
        self.ready: list[tuple[TransferId, KVReady]] = []
        self._changed = asyncio.Event()

    def deliver(
        self, events: Sequence[EngineEvent], load: EngineLoad | None, kv_changes: KVChanges | None
    ) -> None:
        asyncio.get_running_loop()  # it must be called on the loop
        self.events += events
        self.load = load if load is not None else self.load
        self.kv_changes += [kv_changes] if kv_changes is not None else []
        self._changed.set()

    def push_ready(self, transfer_id: TransferId, ready: KVReady) -> None:
        self.ready.append((transfer_id, ready))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def seen(self, kind: type) -> bool:
        return any(isinstance(event, kind) for event in self.events)


class FaultyEngine(SimEngine):
    """Raises in its step, as a bug would."""

    def step(self) -> StepOutput:
        raise RuntimeError("broken kernel")


class PatientEngine(SimEngine):
    """Its steps are not over before it has a second sequence."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.has_begun = threading.Event()

    def step(self) -> StepOutput:
        if self.load().num_waiting < 2:
            self.has_begun.set()
            return StepOutput(is_partial=True)
        return super().step()


class HungEngine(SimEngine):
    """Its step does not return before it is let go."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.has_begun, self.may_go = threading.Event(), threading.Event()

    def step(self) -> StepOutput:
        self.has_begun.set()
        self.may_go.wait()
        return super().step()


class StoppedClock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.time_s = 100.0

    def now_s(self) -> float:
        return self.time_s


def config() -> EngineConfig:
    return EngineConfig(
        "sim", EngineKind.SIM, num_blocks=64, max_num_seqs=4, max_waiting=2, sim_timing=INSTANT
    )


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def make_thread(engine: SimEngine, recorder: Recorder) -> EngineThread:
    return EngineThread(
        engine, MonotonicClock(), deliver=recorder.deliver, push_ready=recorder.push_ready, max_attempts=16
    )


@pytest_asyncio.fixture
async def thread(recorder: Recorder) -> AsyncIterator[EngineThread]:
    engine = SimEngine(config())
    thread = make_thread(engine, recorder)
    thread.start(asyncio.get_running_loop())
    yield thread
    assert await asyncio.to_thread(thread.stop, 10.0)
    load = engine.load()
    assert load.num_held_blocks == 0, "a test left blocks held"


async def test_a_prefill_is_heard_of_once_with_its_token_and_its_kv(
    thread: EngineThread, recorder: Recorder, request_of: Callable[..., TokenRequest]
) -> None:
    thread.send(SubmitPrefill(ONE, request_of(40), ID))
    await recorder.until(lambda: recorder.seen(StepFinished))
    kinds = [type(event) for event in recorder.events]
    assert kinds == [PrefillStarted, StepFinished]
    assert {transfer_id for transfer_id, _ in recorder.ready} == {ID}
    covered = {
        (layer, token) for _, ready in recorder.ready for layer in ready.layers for token in ready.tokens
    }
    assert len(covered) == 4 * 40
    thread.send(ReleaseSequence(ONE))
    await recorder.until(lambda: recorder.seen(SequenceReleased))
    await recorder.until(lambda: recorder.load is not None and recorder.load.num_held_blocks == 0)


async def test_prefix_cache_hit_is_counted(
    thread: EngineThread, recorder: Recorder, request_of: Callable[..., TokenRequest]
) -> None:
    for number in ("1", "2"):
        recorder.events.clear()
        key = SequenceKey(number)
        thread.send(SubmitPrefill(key, request_of(40), ID))
        await recorder.until(lambda: recorder.seen(StepFinished))
        [started] = [event for event in recorder.events if isinstance(event, PrefillStarted)]
        assert started.num_cached_tokens == (0 if number == "1" else 32)
        thread.send(ReleaseSequence(key))
        await recorder.until(lambda: recorder.seen(SequenceReleased))


async def test_reserve_then_release_holds_nothing(
    thread: EngineThread, recorder: Recorder, request_of: Callable[..., TokenRequest]
) -> None:
    thread.send(ReserveSequence(ONE, request_of(40)))
    thread.send(ReleaseSequence(ONE))
    await recorder.until(lambda: recorder.seen(SequenceReleased))
    assert [type(event) for event in recorder.events] == [SequenceReserved, SequenceReleased]
    await recorder.until(lambda: recorder.load is not None and recorder.load.num_held_blocks == 0)


async def test_what_the_engine_refuses_is_told_and_not_raised(
    thread: EngineThread, recorder: Recorder, request_of: Callable[..., TokenRequest]
) -> None:
    thread.send(ReserveSequence(ONE, request_of(5000)))
    await recorder.until(lambda: recorder.seen(SequenceRefused))
    thread.send(SubmitPrefill(ONE, request_of(5000), ID))
    await recorder.until(lambda: len(recorder.events) == 2)
    assert all(isinstance(event, SequenceRefused) for event in recorder.events)


async def test_commands_for_unknown_sequences_do_no_harm(thread: EngineThread, recorder: Recorder) -> None:
    thread.send(StartDecode(ONE, 5))
    thread.send(ReleaseSequence(ONE))
    await recorder.until(lambda: recorder.seen(SequenceReleased))
    assert len(recorder.events) == 1


async def test_an_engine_that_raises_is_told_as_its_death(
    recorder: Recorder, request_of: Callable[..., TokenRequest], caplog: pytest.LogCaptureFixture
) -> None:
    thread = make_thread(FaultyEngine(config()), recorder)
    thread.start(asyncio.get_running_loop())
    thread.send(SubmitPrefill(ONE, request_of(5), ID))
    await recorder.until(lambda: recorder.seen(EngineDied))
    [died] = recorder.events
    assert isinstance(died, EngineDied)
    assert "RuntimeError: broken kernel" in died.message
    assert "engine failed" in caplog.text
    assert await asyncio.to_thread(thread.stop, 10.0)


async def test_commands_are_served_between_the_parts_of_a_step(
    recorder: Recorder, request_of: Callable[..., TokenRequest]
) -> None:
    engine = PatientEngine(config())
    thread = make_thread(engine, recorder)
    thread.start(asyncio.get_running_loop())
    thread.send(SubmitPrefill(ONE, request_of(20), ID))
    thread.send(SubmitPrefill(SequenceKey("2"), request_of(21), TransferId(7, AttemptId(2))))
    await recorder.until(lambda: recorder.seen(StepFinished))
    assert await asyncio.to_thread(thread.stop, 10.0)
    started = [event.key for event in recorder.events if isinstance(event, PrefillStarted)]
    assert started == ["1", "2"]


async def test_the_thread_does_not_pause_between_the_parts_of_a_step(
    recorder: Recorder, request_of: Callable[..., TokenRequest]
) -> None:
    engine = PatientEngine(config())
    thread = make_thread(engine, recorder)
    thread.start(asyncio.get_running_loop())
    thread.send(SubmitPrefill(ONE, request_of(20), ID))
    assert await asyncio.to_thread(engine.has_begun.wait, 20.0)
    assert await asyncio.to_thread(thread.stop, 10.0)
    assert not thread._turns.is_stalled


async def test_more_commands_than_attempts_can_give_is_a_bug(recorder: Recorder) -> None:
    thread = make_thread(SimEngine(config()), recorder)
    for _ in range(5 * 16):
        thread.send(ReleaseSequence(ONE))
    with pytest.raises(AssertionError, match="full"):
        thread.send(ReleaseSequence(ONE))


async def test_a_step_that_does_not_return_shows_and_an_idle_engine_does_not(
    recorder: Recorder, request_of: Callable[..., TokenRequest]
) -> None:
    engine, clock = HungEngine(config()), StoppedClock()
    thread = EngineThread(
        engine, clock, deliver=recorder.deliver, push_ready=recorder.push_ready, max_attempts=16
    )
    thread.start(asyncio.get_running_loop())
    await thread.prepared.wait()
    clock.time_s += 1000.0
    assert thread.stuck_for_s() == 0.0, "it waits for commands, and that may take long"
    thread.send(SubmitPrefill(ONE, request_of(5), ID))
    await asyncio.to_thread(engine.has_begun.wait)
    clock.time_s += 7.0
    assert thread.stuck_for_s() == 7.0
    engine.may_go.set()
    await recorder.until(lambda: recorder.seen(StepFinished))
    assert await asyncio.to_thread(thread.stop, 20)
