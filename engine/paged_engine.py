"""An engine made of a scheduler, a block pool and something that computes.

`PagedEngine` is `kvrelay.engine.interface.Engine` for every engine of ours: the torch engine and the
simulated one differ in their `Executor` alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from kvrelay.core.kv import KVStore
from kvrelay.core.request import TokenRequest
from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.executor import AheadExecutor, DrawFailed, DrawnToken, Executor, Launched, LayerDone
from kvrelay.engine.host_tier import HostTier
from kvrelay.engine.interface import (
    EngineInfo,
    EngineLoad,
    KVReadyListener,
    Reservation,
    SequenceFailure,
    SequenceKey,
    SequenceOutput,
    StepOutput,
)
from kvrelay.engine.kv_progress import KVProgress, announce_prefix_hit
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import Chunk, LiveSequence, Purpose
from kvrelay.engine.step_cost import StepCost
from kvrelay.engine.step_plan import SchedulerLimits

ReadClock = Callable[[], float]
"""Seconds since an arbitrary origin."""
PROMISE_SHARE: Final = 0.9
"""Of the promised inter-token latency a step aims at this share: steps of one shape vary."""


class PagedEngine:
    """See `kvrelay.engine.interface.Engine`, which it implements.

    With `itl_promise_ms` it measures the steps that decode and prefill, by `read_clock`, and lets them
    prefill only what keeps them within the promise.
    """

    def __init__(
        self,
        info: EngineInfo,
        executor: Executor,
        limits: SchedulerLimits,
        *,
        spread_blocks: bool = False,
        layers_per_group: int | None = None,
        itl_promise_ms: float | None = None,
        num_host_blocks: int = 0,
        read_clock: ReadClock = time.perf_counter,
    ) -> None:
        self._info = info
        self._executor = executor
        self._has_host_tier = num_host_blocks > 0
        host_tier = HostTier(num_host_blocks) if num_host_blocks else None
        pool = BlockPool(info.num_blocks, spread=spread_blocks, host_tier=host_tier)
        self._read_clock = read_clock
        self._step_cost: StepCost | None = None
        if itl_promise_ms is not None:
            self._step_cost = StepCost(PROMISE_SHARE * itl_promise_ms / 1e3)
        self._scheduler = Scheduler(info, pool, limits, executor.prepare, self._step_cost)
        self._layers_per_group = layers_per_group
        self._listener: KVReadyListener | None = None
        self._failures: list[SequenceFailure] = []
        self._ahead_executor = executor if isinstance(executor, AheadExecutor) else None
        self._ahead: Launched | None = None

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def kv(self) -> KVStore:
        return self._executor.kv

    def set_kv_ready_listener(self, listener: KVReadyListener | None) -> None:
        self._listener = listener

    def submit(self, request: TokenRequest, key: SequenceKey) -> None:
        self._scheduler.submit(request, key, Purpose.GENERATE)

    def submit_prefill(self, request: TokenRequest, key: SequenceKey) -> None:
        self._scheduler.submit(request, key, Purpose.PREFILL_ONLY)

    def reserve(self, request: TokenRequest, key: SequenceKey) -> Reservation:
        reservation = self._scheduler.reserve(request, key)
        self._move_blocks(before_receive=True)
        return reservation

    def start_decode(self, key: SequenceKey, first_token_id: int) -> None:
        sequence = self._scheduler.reserved(key)
        if sequence is None:
            return
        fault = self._executor.check_received(sequence)
        if fault is not None:
            self._scheduler.release(key)
            self._failures.append(SequenceFailure(key, fault))
            return
        self._scheduler.start_decode(key, first_token_id)

    def release(self, key: SequenceKey) -> None:
        self._scheduler.release(key)

    def has_work(self) -> bool:
        return bool(self._failures) or self._ahead is not None or self._scheduler.has_work()

    def step(self) -> StepOutput:
        launched, self._ahead = self._ahead, None
        if launched is not None:
            return self._finish(launched)
        began_s = self._read_clock()
        plan = self._scheduler.schedule()
        self._move_blocks()
        if (
            self._ahead_executor is not None
            and not plan.admitted
            and not any(chunk.sequence.purpose is Purpose.PREFILL_ONLY for chunk in plan.chunks)
            and self._ahead_executor.can_launch(plan.chunks)
        ):
            return self._finish(self._ahead_executor.launch(plan.chunks))
        listener = self._listener
        layer_done: LayerDone | None = None
        if listener is not None:
            for sequence in plan.admitted:
                announce_prefix_hit(sequence, self.kv.layout.num_layers, listener)
            if any(chunk.sequence.purpose is Purpose.PREFILL_ONLY for chunk in plan.chunks):
                progress = KVProgress(plan.chunks, self.kv, listener, self._layers_per_group)
                layer_done = progress.layer_done
        drawn = self._executor.execute(plan.chunks, layer_done) if plan.chunks else ()
        output = self._commit(plan.chunks, drawn)
        if self._step_cost is not None and plan.shape is not None:
            self._step_cost.observe(plan.shape, self._read_clock() - began_s)
        return output

    def _finish(self, launched: Launched) -> StepOutput:
        """Begin the step after `launched` if it can be told already, then wait for this one."""
        assert self._ahead_executor is not None
        ahead = self._scheduler.schedule_ahead(launched.chunks)
        self._move_blocks()
        if self._ahead_executor.can_launch(ahead):
            self._ahead = self._ahead_executor.launch(ahead)
        results = launched.results()
        self._scheduler.land(launched.chunks, () if self._ahead is None else ahead)
        return self._commit(launched.chunks, results)

    def load(self) -> EngineLoad:
        return self._scheduler.load()

    def prepare_thread(self) -> None:
        self._executor.prepare_thread()

    def close(self) -> None:
        return

    def check(self) -> None:
        """Assert every invariant of scheduler and block pool; for tests."""
        self._scheduler.check()

    def _move_blocks(self, *, before_receive: bool = False) -> None:
        if not self._has_host_tier:
            return
        copies = self._scheduler.take_copies()
        if copies or before_receive:
            self._executor.move_blocks(copies, before_receive=before_receive)

    def _commit(self, chunks: Sequence[Chunk], drawn: Sequence[DrawnToken | DrawFailed]) -> StepOutput:
        outputs: list[SequenceOutput] = []
        num_prefill_tokens = num_decode_tokens = 0
        results = iter(drawn)
        for chunk in chunks:
            if chunk.is_prefill:
                num_prefill_tokens += chunk.num_tokens
            else:
                num_decode_tokens += chunk.num_tokens
            result = next(results) if chunk.samples else None
            if not self._scheduler.is_live(chunk.sequence):  # Released by the listener in this very step.
                continue
            if isinstance(result, DrawFailed):  # Its KV is suspect: it does not join the prefix cache.
                self._scheduler.release(chunk.sequence.key)
                self._failures.append(SequenceFailure(chunk.sequence.key, result.message, result.field))
                continue
            self._scheduler.mark_computed(chunk)
            if result is not None:
                outputs.append(self._deliver(chunk.sequence, result))
        failures, self._failures = tuple(self._failures), []
        return StepOutput(tuple(outputs), failures, num_prefill_tokens, num_decode_tokens)

    def _deliver(self, sequence: LiveSequence, drawn: DrawnToken) -> SequenceOutput:
        index = sequence.num_output_tokens
        reason = self._scheduler.append_token(sequence, drawn.token_id)
        return SequenceOutput(sequence.key, index, drawn.token_id, reason, drawn.logprobs)
