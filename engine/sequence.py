"""One sequence as the scheduler sees it: its tokens, how far its KV reaches, and which blocks it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from kvrelay.core.block_hash import BlockHash, next_block_hash
from kvrelay.core.ids import BlockId
from kvrelay.core.request import FinishReason, TokenRequest
from kvrelay.engine.interface import SequenceKey


class Purpose(Enum):
    """What a sequence is here for."""

    GENERATE = auto()
    """Prefill, where needed, and decode until it finishes."""
    PREFILL_ONLY = auto()
    """Prefill and one token; the KV is then held for a handoff."""


class Stage(Enum):
    """Where a live sequence stands. Each stage but WAITING holds blocks."""

    WAITING = auto()
    RUNNING = auto()
    RESERVED = auto()
    """On a decode node, while its KV arrives."""
    HELD = auto()
    """On a prefill node, computed; until it is released."""


@dataclass(slots=True, eq=False)
class LiveSequence:
    """Mutable; owned by the scheduler.

    KV of the first `num_computed_tokens` of `token_ids` is in the blocks of `block_table`. The current
    prefill ends at `prefill_end_tokens`; everything computed beyond is decode. `hashes` are those of the
    full blocks of `token_ids` as far as they were needed; the first `num_registered_blocks` are in the
    prefix cache. `executor_state` is the executor's own, and lives as long as the sequence. `has_begun`: a
    step that computes it has had its turn. `latest_step`: the number of the last one of those launched that
    computes it, 0 before.
    """

    key: SequenceKey
    request: TokenRequest
    purpose: Purpose
    root: BlockHash
    arrival: int
    stage: Stage
    token_ids: list[int]
    prefill_end_tokens: int
    block_table: list[BlockId] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_registered_blocks: int = 0
    executor_state: object = None
    has_begun: bool = False
    latest_step: int = 0

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.request.num_prompt_tokens

    def block_hash(self, index: int, block_size: int) -> BlockHash:
        """Hash of full block `index`; extends `hashes` up to it."""
        while len(self.hashes) <= index:
            start = len(self.hashes) * block_size
            parent = self.hashes[-1] if self.hashes else self.root
            self.hashes.append(next_block_hash(parent, self.token_ids[start : start + block_size]))
        return self.hashes[index]

    def finish_reason(
        self, token_id: int, eos_token_ids: tuple[int, ...], max_model_len: int
    ) -> FinishReason | None:
        """Whether `token_id`, the last of `token_ids`, ends the sequence."""
        sampling = self.request.sampling
        if token_id in sampling.stop_token_ids or (token_id in eos_token_ids and sampling.ends_at_eos):
            return FinishReason.STOP
        return FinishReason.LENGTH if self.ends_with_length(len(self.token_ids), max_model_len) else None

    def ends_with_length(self, num_tokens: int, max_model_len: int) -> bool:
        """Whether it is over with so many tokens, prompt included, whatever they are."""
        num_output = num_tokens - self.request.num_prompt_tokens
        return num_output >= self.request.sampling.max_tokens or num_tokens >= max_model_len


class Chunk(NamedTuple):
    """Tokens ``[start, start + num_tokens)`` of a sequence, to be computed in one step.

    `samples`: they reach the end of the sequence's tokens, so the next token is drawn.
    """

    sequence: LiveSequence
    start: int
    num_tokens: int
    samples: bool
    is_prefill: bool

    @property
    def end(self) -> int:
        return self.start + self.num_tokens
