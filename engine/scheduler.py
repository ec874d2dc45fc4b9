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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from kvrelay.core.block_hash import root_hash
from kvrelay.core.errors import DuplicateRequest, InvalidRequest, Overloaded
from kvrelay.core.ids import BlockId
from kvrelay.core.request import FinishReason, TokenRequest, check_fits_model
from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.host_tier import BlockCopy
from kvrelay.engine.interface import EngineInfo, EngineLoad, Reservation, SequenceKey
from kvrelay.engine.sequence import Chunk, LiveSequence, Purpose, Stage
from kvrelay.engine.step_cost import StepCost, StepShape

Prepare = Callable[[TokenRequest], object]


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step and of the queue. A step holds at least one token of every running decode."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int

    def __post_init__(self) -> None:
        assert self.max_num_batched_tokens >= self.max_num_seqs >= 1
        assert self.max_waiting >= 0


@dataclass(slots=True)
class StepPlan:
    """What to compute now. `admitted` started in this step; their prefix-cache hits are usable already.

    `shape` is None until `measured` is called.
    """

    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[LiveSequence] = field(default_factory=list)
    num_tokens: int = 0
    shape: StepShape | None = None

    def add(self, sequence: LiveSequence, num_tokens: int) -> None:
        start = sequence.num_computed_tokens
        samples = start + num_tokens == len(sequence.token_ids)
        is_prefill = start < sequence.prefill_end_tokens
        self.chunks.append(Chunk(sequence, start, num_tokens, samples, is_prefill))
        self.num_tokens += num_tokens
        if self.shape is not None:
            self.shape.add(start, num_tokens, is_prefill=is_prefill)

    def measured(self) -> StepShape:
        """The step's shape so far, which is kept up to date from now on."""
        if self.shape is None:
            self.shape = StepShape()
            for chunk in self.chunks:
                self.shape.add(chunk.start, chunk.num_tokens, is_prefill=chunk.is_prefill)
        return self.shape


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
        self._step_cost = step_cost
        self._info = info
        self._pool = pool
        self._limits = limits
        self._live: dict[SequenceKey, LiveSequence] = {}
        self._waiting: deque[LiveSequence] = deque()
        self._running: list[LiveSequence] = []
        self._num_reserved = 0
        self._late_blocks: list[list[BlockId]] = []
        self._num_arrivals = 0
        self._num_preemptions = 0
        self._prefix_hit_tokens = 0
        self._prefix_query_tokens = 0
        self._host_hit_tokens = 0

    @property
    def pool(self) -> BlockPool:
        return self._pool

    def is_live(self, sequence: LiveSequence) -> bool:
        return self._live.get(sequence.key) is sequence

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
        if not self._take_blocks(sequence, num_spare_blocks=0):
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
        self._register_full_blocks(sequence)
        sequence.token_ids.append(first_token_id)
        if self._finish_reason(sequence, first_token_id) is not None:
            self.release(key)
            return
        self._num_reserved -= 1
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
        self._free_blocks(sequence)

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
                plan.add(sequence, 1)
        for sequence in self._running:
            if len(sequence.token_ids) - sequence.num_computed_tokens > 1:
                self._add_prefill(plan, sequence)
        self._admit_waiting(plan)
        return plan

    def schedule_ahead(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Plan the step after `chunks`, which are under way and decode alone, before their tokens are known.

        Empty where that step can't be told yet: someone waits and may be admitted, or blocks are so few that
        a sequence may have to be interrupted. Sequences that end by their length are left out.
        """
        if self._pool.num_free < len(self._running) or (self._waiting and self._can_admit(self._waiting[0])):
            return []
        under_way = {id(chunk.sequence): chunk for chunk in chunks}
        ahead: list[Chunk] = []
        for sequence in self._running:
            chunk = under_way.get(id(sequence))
            start = sequence.num_computed_tokens if chunk is None else chunk.end
            if chunk is None and len(sequence.token_ids) - start != 1:
                return []
            if chunk is not None and sequence.ends_with_length(start + 1, self._info.max_model_len):
                continue
            if start >= len(sequence.block_table) * self._info.block_size:
                sequence.block_table += self._pool.allocate(1, after=sequence.block_table[-1])
            ahead.append(Chunk(sequence, start, 1, samples=True, is_prefill=False))
        return ahead

    def land(self, chunks: Sequence[Chunk], ahead: Sequence[Chunk]) -> None:
        """The step `chunks` is computed: free what had to be kept for it. Now `ahead` is under way."""
        for chunk in chunks:
            chunk.sequence.is_ahead = False
        for chunk in ahead:
            chunk.sequence.is_ahead = True
        late_blocks, self._late_blocks = self._late_blocks, []
        for block_table in late_blocks:
            self._pool.release(block_table)

    def mark_computed(self, chunk: Chunk) -> None:
        """The chunk's KV is final: register the blocks it has filled."""
        sequence = chunk.sequence
        sequence.num_computed_tokens = chunk.end
        if chunk.end // self._info.block_size > sequence.num_registered_blocks:
            self._register_full_blocks(sequence)

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

    def take_copies(self) -> list[BlockCopy]:
        """What is to be copied between device and host before anything else happens to the blocks."""
        return [] if self._pool.host_tier is None else self._pool.host_tier.take_copies()

    def load(self) -> EngineLoad:
        tier = self._pool.host_tier
        return EngineLoad(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_waiting_tokens=sum(len(sequence.token_ids) for sequence in self._waiting),
            num_reserved=self._num_reserved,
            num_held_blocks=self._pool.num_held,
            num_cached_blocks=self._pool.num_cached,
            num_empty_blocks=self._pool.num_empty,
            num_preemptions=self._num_preemptions,
            prefix_hit_tokens=self._prefix_hit_tokens,
            prefix_query_tokens=self._prefix_query_tokens,
            num_host_blocks=0 if tier is None else tier.num_slots,
            num_used_host_blocks=0 if tier is None else tier.num_used,
            host_hit_tokens=self._host_hit_tokens,
        )

    def check(self) -> None:
        """Assert every invariant; for tests."""
        self._pool.check()
        held = {block for sequence in self._live.values() for block in sequence.block_table}
        held |= {block for block_table in self._late_blocks for block in block_table}
        assert len(held) == self._pool.num_held, "a block is held that no live sequence names"
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

    def _match_prefix(self, sequence: LiveSequence) -> list[BlockId | None]:
        """Cached blocks of its prefix, None where the host has it; never of all its tokens: the last token
        must be computed."""
        block_size = self._info.block_size
        num_matchable = (len(sequence.token_ids) - 1) // block_size
        return self._pool.match_prefix(
            sequence.block_hash(index, block_size) for index in range(num_matchable)
        )

    def _num_missing(self, sequence: LiveSequence, matched: Sequence[BlockId | None]) -> int:
        """Free blocks that the sequence would use up, cached ones that it takes over included."""
        num_blocks = -(-len(sequence.token_ids) // self._info.block_size)
        on_device = [block for block in matched if block is not None]
        return num_blocks - len(on_device) + self._pool.num_unheld(on_device)

    def _can_admit(self, sequence: LiveSequence) -> bool:
        if len(self._running) + self._num_reserved >= self._limits.max_num_seqs:
            return False
        num_missing = self._num_missing(sequence, self._match_prefix(sequence))
        return num_missing + self._num_spare_blocks() <= self._pool.num_free

    def _num_spare_blocks(self) -> int:
        """Room left for running sequences to grow, so that admitting one interrupts no other at once."""
        return len(self._running)

    def _take_blocks(self, sequence: LiveSequence, num_spare_blocks: int) -> bool:
        matched = self._match_prefix(sequence)
        if self._num_missing(sequence, matched) + num_spare_blocks > self._pool.num_free:
            return False
        block_size = self._info.block_size
        num_blocks = -(-len(sequence.token_ids) // block_size)
        sequence.block_table = self._pool.take(matched, sequence.hashes[: len(matched)], num_blocks)
        sequence.num_registered_blocks = len(matched)
        sequence.num_cached_tokens = sequence.num_computed_tokens = len(matched) * block_size
        self._prefix_hit_tokens += sequence.num_cached_tokens
        self._host_hit_tokens += matched.count(None) * block_size
        self._prefix_query_tokens += len(sequence.token_ids)
        return True

    def _admit_waiting(self, plan: StepPlan) -> None:
        while self._waiting and self._num_prefill_tokens(plan, start=0, num_left=self._info.block_size):
            sequence = self._waiting[0]
            if len(self._running) + self._num_reserved >= self._limits.max_num_seqs:
                return
            if not self._take_blocks(sequence, self._num_spare_blocks()):
                return
            self._waiting.popleft()
            sequence.prefill_end_tokens = len(sequence.token_ids)
            self._run(sequence)
            plan.admitted.append(sequence)
            self._add_prefill(plan, sequence)

    def _add_prefill(self, plan: StepPlan, sequence: LiveSequence) -> None:
        start = sequence.num_computed_tokens
        num_tokens = self._num_prefill_tokens(plan, start, len(sequence.token_ids) - start)
        if num_tokens:
            plan.add(sequence, num_tokens)

    def _num_prefill_tokens(self, plan: StepPlan, start: int, num_left: int) -> int:
        """How much of a prefill that stands at `start` the step takes: 0 where it has no room."""
        num_room = self._limits.max_num_batched_tokens - plan.num_tokens
        if self._step_cost is None or not plan.measured().num_decode_rows:
            return min(num_left, num_room)
        shape, block_size = plan.measured(), self._info.block_size
        num_allowed = self._step_cost.max_prefill_tokens(shape, start)
        is_first = not shape.num_prefill_tokens
        if is_first:
            num_allowed = max(num_allowed, block_size - start % block_size)
        num_allowed = min(num_allowed, num_room)
        if num_left <= num_allowed:
            return num_left
        num_to_boundary = num_allowed - (start + num_allowed) % block_size
        if num_to_boundary > 0:
            return num_to_boundary
        return num_allowed if is_first else 0

    def _grow(self, sequence: LiveSequence) -> bool:
        """Make room for one more token. False: the sequence itself was interrupted."""
        if sequence.stage is not Stage.RUNNING:
            return False
        if len(sequence.token_ids) <= len(sequence.block_table) * self._info.block_size:
            return True
        while self._pool.num_free == 0:
            victim = next(
                (other for other in reversed(self._running) if other.purpose is Purpose.GENERATE), None
            )
            assert victim is not None, "the growing sequence itself may be interrupted"
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += self._pool.allocate(1, after=sequence.block_table[-1])
        return True

    def _preempt(self, sequence: LiveSequence) -> None:
        self._running.remove(sequence)
        self._free_blocks(sequence)
        sequence.stage = Stage.WAITING
        self._waiting.appendleft(sequence)
        self._num_preemptions += 1

    def _free_blocks(self, sequence: LiveSequence) -> None:
        if sequence.is_ahead:
            self._late_blocks.append(sequence.block_table)
        else:
            self._pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = sequence.num_cached_tokens = sequence.num_registered_blocks = 0

    def _register_full_blocks(self, sequence: LiveSequence) -> None:
        block_size = self._info.block_size
        num_full = sequence.num_computed_tokens // block_size
        for index in range(sequence.num_registered_blocks, num_full):
            self._pool.register(sequence.block_table[index], sequence.block_hash(index, block_size))
        sequence.num_registered_blocks = num_full

    def _finish_reason(self, sequence: LiveSequence, token_id: int) -> FinishReason | None:
        return sequence.finish_reason(token_id, self._info.eos_token_ids, self._info.max_model_len)
