"""One step being planned: what is in it so far, and how much of a prefill it still takes."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvrelay.engine.sequence import Chunk, LiveSequence
from kvrelay.engine.step_cost import StepCost, StepShape


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
    """What one step is to compute. `shape` is None until `measured` is called."""

    chunks: list[Chunk] = field(default_factory=list)
    num_tokens: int = 0
    shape: StepShape | None = None

    def add(self, sequence: LiveSequence, start: int, num_tokens: int) -> None:
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


class PrefillBudget:
    """`step_cost` limits what steps that decode prefill; None: they prefill as much as others."""

    def __init__(self, max_step_tokens: int, block_size: int, step_cost: StepCost | None) -> None:
        self._max_step_tokens = max_step_tokens
        self._block_size = block_size
        self._step_cost = step_cost

    def has_room(self, plan: StepPlan) -> bool:
        """Whether the step takes any of a prefill that is not begun."""
        return self.num_tokens(plan, start=0, num_left=self._block_size) > 0

    def fill(self, plan: StepPlan, sequence: LiveSequence, start: int) -> None:
        """Add as much of its prefill, which stands at `start`, as the step takes."""
        num_tokens = self.num_tokens(plan, start, len(sequence.token_ids) - start)
        if num_tokens:
            plan.add(sequence, start, num_tokens)

    def num_tokens(self, plan: StepPlan, start: int, num_left: int) -> int:
        """How much the step takes of a prefill that stands at `start`: 0 where it has no room."""
        num_room = self._max_step_tokens - plan.num_tokens
        if self._step_cost is None or not plan.measured().num_decode_rows:
            return min(num_left, num_room)
        shape, block_size = plan.measured(), self._block_size
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
