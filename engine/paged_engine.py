"""An engine made of a scheduler, a block pool and something that computes.

`PagedEngine` is `kvrelay.engine.interface.Engine` for every engine of ours: the torch engine and the
simulated one differ in their `Executor` alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Final

from kvrelay.core.kv import KVStore
from kvrelay.core.kv_events import KVChanges
from kvrelay.core.request import Prefix, TokenRequest
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
    StartedPrefill,
    StepOutput,
)
from kvrelay.engine.kv_progress import KVProgress, announce_prefix_hit
from kvrelay.engine.prefix_holds import PrefixHolds
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import Chunk, LiveSequence, Purpose
from kvrelay.engine.step_cost import StepCost
from kvrelay.engine.step_plan import SchedulerLimits, StepPlan

ReadClock = Callable[[], float]
"""Seconds since an arbitrary origin."""
PROMISE_SHARE: Final = 0.9
"""Of the promised inter-token latency a step aims at this share: steps of one shape vary."""
BLOCKS_BESIDE_STEP: Final = 256
"""To register while the device computes a step: some 0.4 ms."""


class PagedEngine:
    """See `kvrelay.engine.interface.Engine`, which it implements.

    Where the executor can, the next step is launched before the tokens of the one before are known, while
    `runs_ahead` is set; it may change at any time. With `itl_promise_ms` it measures the steps that decode
    and prefill, by `read_clock`, and lets them prefill only what keeps them within the promise.
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
        self._prefixes = PrefixHolds(pool, info.block_size, info.fingerprint.digest)
        self._layers_per_group = layers_per_group
        self._listener: KVReadyListener | None = None
        self._failures: list[SequenceFailure] = []
        self._ahead_executor = executor if isinstance(executor, AheadExecutor) else None
        self._current: Launched | None = None
        self._ahead: Launched | None = None
        self.runs_ahead = True
        self._may_plan_ahead = False

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
        self._may_plan_ahead = True

    def submit_prefill(self, request: TokenRequest, key: SequenceKey) -> None:
        self._scheduler.submit(request, key, Purpose.PREFILL_ONLY)
        self._may_plan_ahead = True

    def reserve(self, request: TokenRequest, key: SequenceKey) -> Reservation:
        reservation = self._scheduler.reserve(request, key)
        self._move_blocks(before_receive=True)
        return reservation

    def start_decode(self, key: SequenceKey, first_token_id: int) -> None:
        sequence = self._scheduler.reserved(key)
        if sequence is None:
            return
        fault = self._executor.check_received(sequence.token_ids, sequence.block_table)
        if fault is not None:
            self._scheduler.release(key)
            self._failures.append(SequenceFailure(key, fault))
            return
        self._scheduler.start_decode(key, first_token_id)

    def pin_prefix(self, prefix: Prefix, key: SequenceKey) -> Reservation:
        pinned = self._prefixes.pin(prefix, key)
        self._move_blocks()
        self._executor.reveal_restored()
        return pinned

    def reserve_prefix(self, prefix: Prefix, key: SequenceKey) -> Reservation:
        reservation = self._prefixes.reserve(prefix, key)
        self._move_blocks(before_receive=True)
        return reservation

    def keep_prefix(self, key: SequenceKey, num_tokens: int) -> int:
        held = self._prefixes.held(key)
        if held is None:
            return 0
        self._may_plan_ahead = True
        if self._executor.check_received(held.prefix.token_ids[:num_tokens], held.block_table) is not None:
            self._prefixes.release(key)
            return 0
        return self._prefixes.keep(key, num_tokens)

    def release(self, key: SequenceKey) -> None:
        self._prefixes.release(key)
        self._scheduler.release(key)
        self._may_plan_ahead = True

    def has_work(self) -> bool:
        is_under_way = self._current is not None or self._ahead is not None
        return bool(self._failures) or is_under_way or self._scheduler.has_work()

    def step(self) -> StepOutput:
        started: tuple[StartedPrefill, ...] = ()
        if self._current is None:
            if self._ahead is None:
                began_s = self._read_clock()
                plan = self._scheduler.schedule()
                self._move_blocks()
                started = self._begin(plan.chunks)
                if self._ahead_executor is None or not self._ahead_executor.can_launch(plan.chunks):
                    return self._execute(plan, started, began_s)
                self._current = self._launch(plan.chunks)
                self._scheduler.hash_ahead(plan.chunks)
            else:
                self._current, self._ahead = self._ahead, None
                started = self._begin(self._current.chunks)
            self._may_plan_ahead = True
        return self._go_on(self._current, started)

    def _begin(self, chunks: Sequence[Chunk]) -> tuple[StartedPrefill, ...]:
        """A step's turn has come: report what the cache had of those that it computes first."""
        self._executor.reveal_restored()
        begun = [
            sequence
            for sequence in self._scheduler.begin(chunks)
            if sequence.purpose is Purpose.PREFILL_ONLY and self._scheduler.is_live(sequence)
        ]
        if self._listener is not None:
            for sequence in begun:
                announce_prefix_hit(sequence, self.kv.layout.num_layers, self._listener)
        return tuple(StartedPrefill(sequence.key, sequence.num_cached_tokens) for sequence in begun)

    def _execute(self, plan: StepPlan, started: tuple[StartedPrefill, ...], began_s: float) -> StepOutput:
        """One whole step, with nothing else under way."""
        self._scheduler.catch_up()
        drawn = self._executor.execute(plan.chunks, self._layer_done(plan.chunks)) if plan.chunks else ()
        output = self._commit(plan.chunks, drawn, started)
        if self._step_cost is not None and plan.shape is not None:
            self._step_cost.observe(plan.shape, self._read_clock() - began_s)
        return output

    def _go_on(self, current: Launched, started: tuple[StartedPrefill, ...]) -> StepOutput:
        """Launch the step after `current` if it can be told already; wait for this one or a part of it."""
        may_launch = self.runs_ahead and self._may_plan_ahead and self._ahead is None
        if may_launch and current.has_time():
            self._launch_ahead(current)
        self._scheduler.catch_up(BLOCKS_BESIDE_STEP)
        if not current.advance():
            return StepOutput(failures=self._take_failures(), started=started, is_partial=True)
        results = current.results()
        self._current = None
        self._scheduler.land()
        return self._commit(current.chunks, results, started)

    def _launch_ahead(self, current: Launched) -> None:
        assert self._ahead_executor is not None
        self._may_plan_ahead = False  # until something changes
        chunks = self._scheduler.schedule_ahead(current.chunks)
        self._move_blocks()
        if chunks and self._ahead_executor.can_launch(chunks):
            self._ahead = self._launch(chunks)
            self._scheduler.hash_ahead(chunks)

    def _launch(self, chunks: Sequence[Chunk]) -> Launched:
        assert self._ahead_executor is not None
        self._scheduler.launch(chunks)
        return self._ahead_executor.launch(chunks, self._layer_done(chunks))

    def _layer_done(self, chunks: Sequence[Chunk]) -> LayerDone | None:
        if self._listener is None or all(item.sequence.purpose is Purpose.GENERATE for item in chunks):
            return None
        progress = KVProgress(
            chunks, self.kv, self._listener, self._layers_per_group, self._scheduler.is_live
        )
        return progress.layer_done

    def load(self) -> EngineLoad:
        return self._scheduler.load()

    def take_kv_changes(self) -> KVChanges | None:
        return self._scheduler.pool.take_changes()

    def prepare_thread(self) -> None:
        self._executor.prepare_thread()

    def close(self) -> None:
        return

    def live_sequences(self) -> Collection[LiveSequence]:
        """All that have not ended."""
        return self._scheduler.live_sequences()

    def check(self) -> None:
        """Assert every invariant of scheduler and block pool; for tests."""
        self._scheduler.check(self._prefixes.blocks())

    def _move_blocks(self, *, before_receive: bool = False) -> None:
        if not self._has_host_tier:
            return
        copies = self._scheduler.take_copies()
        if copies or before_receive:
            self._executor.move_blocks(copies, before_receive=before_receive)

    def _commit(
        self,
        chunks: Sequence[Chunk],
        drawn: Sequence[DrawnToken | DrawFailed],
        started: tuple[StartedPrefill, ...],
    ) -> StepOutput:
        outputs: list[SequenceOutput] = []
        num_prefill_tokens = num_decode_tokens = 0
        results = iter(drawn)
        for chunk in chunks:
            if chunk.is_prefill:
                num_prefill_tokens += chunk.num_tokens
            else:
                num_decode_tokens += chunk.num_tokens
            result = next(results) if chunk.samples else None
            if not self._scheduler.is_live(chunk.sequence):  # Released while it was computed.
                continue
            if isinstance(result, DrawFailed):  # Its KV is suspect: it does not join the prefix cache.
                self._scheduler.release(chunk.sequence.key)
                self._failures.append(SequenceFailure(chunk.sequence.key, result.message, result.field))
                continue
            self._scheduler.mark_computed(chunk)
            if result is not None:
                outputs.append(self._deliver(chunk.sequence, result))
        failures = self._take_failures()
        return StepOutput(tuple(outputs), failures, num_prefill_tokens, num_decode_tokens, started)

    def _take_failures(self) -> tuple[SequenceFailure, ...]:
        failures, self._failures = tuple(self._failures), []
        return failures

    def _deliver(self, sequence: LiveSequence, drawn: DrawnToken) -> SequenceOutput:
        index = sequence.num_output_tokens
        reason = self._scheduler.append_token(sequence, drawn.token_id)
        return SequenceOutput(sequence.key, index, drawn.token_id, reason, drawn.logprobs)
