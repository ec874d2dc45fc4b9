"""What runs next: continuous batching over the block pool.

Each step takes every running decode first, then continues running prefills, then admits waiting
sequences first come first served, under a budget of tokens. Where the engine promises an inter-token
latency, a step that decodes takes less prefill: what its cost (`StepCost`) allows, up to a block boundary,
but to the end of one block at the least, so that no prefill starves.

A sequence gets the blocks of all its known tokens when it is admitted; only decode grows. When a decode
finds no block, the latest arrival that may be interrupted gives up its blocks and waits at the front of the
queue; it is recomputed from its tokens, which its own cached blocks make cheap. Prefill-only and reserved
sequences are never interrupted: their KV is being read or written by a transfer.

Pure: no torch, no clock, no I/O. Source: vLLM's continuous batching and chunked prefill, for the policy.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import attrgetter

from kvrelay.core.block_hash import root_hash
from kvrelay.core.errors import DuplicateRequest, InvalidRequest, Overloaded
from kvrelay.core.ids import BlockId
from kvrelay.core.request import FinishReason, TokenRequest, check_fits_model
from kvrelay.engine.ahead_plan import next_decodes, next_prefills
from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.host_tier import BlockCopy
from kvrelay.engine.interface import EngineInfo, EngineLoad, Reservation, SequenceKey
from kvrelay.engine.sequence import Chunk, LiveSequence, Purpose, Stage
from kvrelay.engine.sequence_blocks import SequenceBlocks
from kvrelay.engine.step_cost import StepCost
from kvrelay.engine.step_plan import PrefillBudget, SchedulerLimits, StepPlan

Prepare = Callable[[TokenRequest], object]


class Scheduler:
    """The live sequences of one engine. See the module's text.

    `prepare` gives a new sequence's `executor_state`, and may refuse its request. `step_cost` limits
    what steps that decode prefill; None: they prefill as much as others.
    """

    def __init__(
        self,
        info: EngineInfo,
        pool: BlockPool,
        limits: SchedulerLimits,
        prepare: Prepare,
        step_cost: StepCost | None = None,
    ) -> None:
        self._prepare = prepare
        self._info = info
        self._pool = pool
        self._blocks = SequenceBlocks(pool, info.block_size)
        self._budget = PrefillBudget(limits.max_num_batched_tokens, info.block_size, step_cost)
        self._limits = limits
        self._live: dict[SequenceKey, LiveSequence] = {}
        self._waiting: deque[LiveSequence] = deque()
        self._running: list[LiveSequence] = []
        self._num_reserved = 0
        self._num_arrivals = 0
        self._num_preemptions = 0

    @property
    def pool(self) -> BlockPool:
        return self._pool

    def is_live(self, sequence: LiveSequence) -> bool:
        return self._live.get(sequence.key) is sequence

    def live_sequences(self) -> Collection[LiveSequence]:
        """All that have not ended."""
        return self._live.values()

    def submit(self, request: TokenRequest, key: SequenceKey, purpose: Purpose) -> None:
        """Queue a sequence.

        Raises:
            Overloaded: `max_waiting` sequences wait already.
            InvalidRequest, ContextLengthExceeded: the model, the pool or the executor could never take it.
            DuplicateRequest: the key is in use.
        """
        self._check(request, key)
        if len(self._waiting) >= self._limits.max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests wait already, the queue holds no more")
        sequence = self._new_sequence(request, key, purpose, Stage.WAITING)
        self._waiting.append(sequence)

    def reserve(self, request: TokenRequest, key: SequenceKey) -> Reservation:
        """Take blocks for all of the request's tokens now. Raises as `submit`; Overloaded: no room now."""
        self._check(request, key)
        if len(self._running) + self._num_reserved >= self._limits.max_num_seqs:
            raise Overloaded(f"all {self._limits.max_num_seqs} decode slots are taken")
        sequence = self._new_sequence(request, key, Purpose.GENERATE, Stage.RESERVED)
        if not self._blocks.take(sequence, num_spare_blocks=0):
            del self._live[key]
            raise Overloaded(
                f"{len(request.token_ids)} tokens do not fit the {self._pool.num_free} KV blocks now free"
            )
        self._num_reserved += 1
        return Reservation(key, tuple(sequence.block_table), sequence.num_cached_tokens)

    def start_decode(self, key: SequenceKey, first_token_id: int) -> None:
        """The reserved sequence's KV is whole; a first token that ends the sequence frees it at once."""
        sequence = self._live.get(key)
        if sequence is None or sequence.stage is not Stage.RESERVED:
            return
        sequence.num_computed_tokens = len(sequence.token_ids)
        self._blocks.register_later(sequence)
        sequence.token_ids.append(first_token_id)
        if self._finish_reason(sequence, first_token_id) is not None:
            self.release(key)
            return
        self._num_reserved -= 1
        sequence.has_begun = True
        self._run(sequence)

    def release(self, key: SequenceKey) -> None:
        """Forget the sequence and free its blocks, whatever its stage."""
        sequence = self._live.pop(key, None)
        if sequence is None:
            return
        if sequence.stage is Stage.WAITING:
            self._waiting.remove(sequence)
        elif sequence.stage is Stage.RUNNING:
            self._running.remove(sequence)
        elif sequence.stage is Stage.RESERVED:
            self._num_reserved -= 1
        self._blocks.free(sequence)

    def reserved(self, key: SequenceKey) -> LiveSequence | None:
        """The sequence under `key`, if its KV is still to arrive."""
        sequence = self._live.get(key)
        return sequence if sequence is not None and sequence.stage is Stage.RESERVED else None

    def has_work(self) -> bool:
        """Whether `schedule` would plan something."""
        return bool(self._running) or (bool(self._waiting) and self._can_admit(self._waiting[0]))

    def schedule(self) -> StepPlan:
        """Plan one step. Takes blocks, and interrupts sequences where there are too few."""
        plan = StepPlan()
        for sequence in list(self._running):
            if len(sequence.token_ids) - sequence.num_computed_tokens == 1 and self._grow(sequence):
                plan.add(sequence, sequence.num_computed_tokens, 1)
        for sequence in self._running:
            if len(sequence.token_ids) - sequence.num_computed_tokens > 1:
                self._budget.fill(plan, sequence, sequence.num_computed_tokens)
        self._admit_waiting(plan)
        return plan

    def schedule_ahead(self, chunks: Sequence[Chunk]) -> Sequence[Chunk]:
        """Plan the step after `chunks`, the last step launched, before its tokens are known.

        Empty where that step can't be told yet. Behind a step that decodes comes one that decodes; behind one
        that prefills, one that prefills and may admit who waits.
        """
        if all(chunk.is_prefill for chunk in chunks):
            plan = (
                None if self._num_reserved else next_prefills(chunks, self._running, self._budget, self._info)
            )
            if plan is None:
                return ()
            self._admit_waiting(plan, chunks)
            return plan.chunks
        if self._pool.num_free < len(self._running) or (self._waiting and self._can_admit(self._waiting[0])):
            return ()  # someone may have to be interrupted, or comes in between
        return next_decodes(chunks, self._running, self._blocks, self._info)

    def begin(self, chunks: Sequence[Chunk]) -> list[LiveSequence]:
        """A step is the first in the queue now; returns those that no step had computed before."""
        begun = [chunk.sequence for chunk in chunks if not chunk.sequence.has_begun]
        for sequence in begun:
            sequence.has_begun = True
        return begun

    def launch(self, chunks: Sequence[Chunk]) -> None:
        """A step is under way: what it uses is kept until it has landed, whoever is released."""
        self._blocks.launch(chunk.sequence for chunk in chunks)

    def land(self) -> None:
        """The first of the steps under way is computed: free what had to be kept for it."""
        self._blocks.land()

    def mark_computed(self, chunk: Chunk) -> None:
        """The chunk's KV is final: register the blocks it has filled."""
        sequence = chunk.sequence
        sequence.num_computed_tokens = chunk.end
        if chunk.end // self._info.block_size > sequence.num_registered_blocks:
            self._blocks.register(sequence)

    def append_token(self, sequence: LiveSequence, token_id: int) -> FinishReason | None:
        """The next token was drawn. A finished sequence is freed, a prefill-only one is held from now on."""
        sequence.token_ids.append(token_id)
        reason = self._finish_reason(sequence, token_id)
        if sequence.purpose is Purpose.PREFILL_ONLY:
            self._running.remove(sequence)
            sequence.stage = Stage.HELD
        elif reason is not None:
            self.release(sequence.key)
        return reason

    def catch_up(self, max_blocks: int | None = None) -> None:
        """Let up to so many blocks join the prefix cache whose KV is there: `start_decode` puts that off."""
        self._blocks.catch_up(max_blocks)

    def hash_ahead(self, chunks: Sequence[Chunk]) -> None:
        """Hash the blocks that these prefill chunks will have filled when they are computed."""
        for chunk in chunks:
            num_full = chunk.end // self._info.block_size
            if chunk.is_prefill and num_full:
                chunk.sequence.block_hash(num_full - 1, self._info.block_size)

    def take_copies(self) -> list[BlockCopy]:
        """What is to be copied between device and host before anything else happens to the blocks."""
        return self._blocks.take_copies()

    def load(self) -> EngineLoad:
        """A sequence waits until its first step has begun, though that may be queued already."""
        tier = self._pool.host_tier
        not_begun = [sequence for sequence in self._running if not sequence.has_begun]
        return EngineLoad(
            num_running=len(self._running) - len(not_begun),
            num_waiting=len(self._waiting) + len(not_begun),
            num_waiting_tokens=sum(len(sequence.token_ids) for sequence in (*not_begun, *self._waiting)),
            num_reserved=self._num_reserved,
            num_held_blocks=self._pool.num_held,
            num_cached_blocks=self._pool.num_cached,
            num_empty_blocks=self._pool.num_empty,
            num_preemptions=self._num_preemptions,
            prefix_hit_tokens=self._blocks.prefix_hit_tokens,
            prefix_query_tokens=self._blocks.prefix_query_tokens,
            num_host_blocks=0 if tier is None else tier.num_slots,
            num_used_host_blocks=0 if tier is None else tier.num_used,
            host_hit_tokens=self._blocks.host_hit_tokens,
        )

    def check(self, others: Iterable[BlockId] = ()) -> None:
        """Assert every invariant; for tests. `others` are held for no sequence."""
        self._blocks.check(self._live.values(), others)
        assert self._running == sorted(self._running, key=attrgetter("arrival"))
        assert all(sequence.stage is Stage.RUNNING for sequence in self._running)
        assert all(sequence.stage is Stage.WAITING and not sequence.block_table for sequence in self._waiting)
        stages = [sequence.stage for sequence in self._live.values()]
        assert stages.count(Stage.RESERVED) == self._num_reserved
        assert stages.count(Stage.RUNNING) == len(self._running) <= self._limits.max_num_seqs
        assert stages.count(Stage.WAITING) == len(self._waiting)

    def _check(self, request: TokenRequest, key: SequenceKey) -> None:
        if key in self._live:
            raise DuplicateRequest(f"a live sequence has the key {key!r} already")
        check_fits_model(request, vocab_size=self._info.vocab_size, max_model_len=self._info.max_model_len)
        if request.num_remaining_tokens < 1:
            raise InvalidRequest(
                f"sampling.max_tokens is {request.sampling.max_tokens}, and"
                f" {request.num_output_tokens} output tokens were delivered already",
                field="sampling.max_tokens",
            )

    def _new_sequence(
        self, request: TokenRequest, key: SequenceKey, purpose: Purpose, stage: Stage
    ) -> LiveSequence:
        self._num_arrivals += 1
        sequence = LiveSequence(
            key=key,
            request=request,
            purpose=purpose,
            root=root_hash(request.cache_salt, self._info.fingerprint.digest),
            arrival=self._num_arrivals,
            stage=stage,
            token_ids=list(request.token_ids),
            prefill_end_tokens=len(request.token_ids),
            executor_state=self._prepare(request),
        )
        self._live[key] = sequence
        return sequence

    def _run(self, sequence: LiveSequence) -> None:
        sequence.stage = Stage.RUNNING
        if not self._running or self._running[-1].arrival < sequence.arrival:
            self._running.append(sequence)
        else:
            insort(self._running, sequence, key=attrgetter("arrival"))

    def _can_admit(self, sequence: LiveSequence) -> bool:
        if len(self._running) + self._num_reserved >= self._limits.max_num_seqs:
            return False
        return self._blocks.fits(sequence, self._num_spare_blocks())

    def _num_spare_blocks(self) -> int:
        """Room left for running sequences to grow, so that admitting one interrupts no other at once."""
        return len(self._running)

    def _admit_waiting(self, plan: StepPlan, under_way: Sequence[Chunk] = ()) -> None:
        """Whoever would find more of its prefix cached behind the step under way waits for that."""
        while self._waiting and self._budget.has_room(plan):
            sequence = self._waiting[0]
            if under_way and self._blocks.finds_more_behind(sequence, under_way):
                return
            if len(self._running) + self._num_reserved >= self._limits.max_num_seqs:
                return
            if not self._blocks.take(sequence, self._num_spare_blocks()):
                return
            self._waiting.popleft()
            sequence.prefill_end_tokens = len(sequence.token_ids)
            self._run(sequence)
            self._budget.fill(plan, sequence, sequence.num_computed_tokens)

    def _grow(self, sequence: LiveSequence) -> bool:
        """Make room for one more token. False: the sequence itself was interrupted."""
        if sequence.stage is not Stage.RUNNING:
            return False
        if self._blocks.holds(sequence, len(sequence.token_ids)):
            return True
        while self._pool.num_free == 0:
            victim = next(
                (other for other in reversed(self._running) if other.purpose is Purpose.GENERATE), None
            )
            assert victim is not None, "the growing sequence itself may be interrupted"
            self._preempt(victim)
            if victim is sequence:
                return False
        self._blocks.grow(sequence)
        return True

    def _preempt(self, sequence: LiveSequence) -> None:
        self._running.remove(sequence)
        self._blocks.free(sequence)
        sequence.stage = Stage.WAITING
        self._waiting.appendleft(sequence)
        self._num_preemptions += 1

    def _finish_reason(self, sequence: LiveSequence, token_id: int) -> FinishReason | None:
        return sequence.finish_reason(token_id, self._info.eos_token_ids, self._info.max_model_len)
