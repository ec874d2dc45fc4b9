"""What is computed behind a step that is under way, planned before its tokens are known.

Pure: no torch, no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvrelay.engine.interface import EngineInfo
from kvrelay.engine.sequence import Chunk, LiveSequence, Purpose
from kvrelay.engine.sequence_blocks import SequenceBlocks
from kvrelay.engine.step_plan import PrefillBudget, StepPlan


def next_decodes(
    chunks: Sequence[Chunk], running: Sequence[LiveSequence], blocks: SequenceBlocks, info: EngineInfo
) -> list[Chunk]:
    """One more token for all that run, behind `chunks`, which decode. The pool has a block for each.

    Empty where a prefill comes in between. Sequences that end by their length are left out.
    """
    under_way = {id(chunk.sequence): chunk for chunk in chunks}
    ahead: list[Chunk] = []
    for sequence in running:
        chunk = under_way.get(id(sequence))
        start = sequence.num_computed_tokens if chunk is None else chunk.end
        if chunk is None and (len(sequence.token_ids) - start != 1 or start < sequence.prefill_end_tokens):
            return []
        if chunk is not None and sequence.ends_with_length(start + 1, info.max_model_len):
            continue
        if not blocks.holds(sequence, start + 1):
            blocks.grow(sequence)
        ahead.append(Chunk(sequence, start, 1, samples=True, is_prefill=False))
    return ahead


def next_prefills(
    chunks: Sequence[Chunk], running: Sequence[LiveSequence], budget: PrefillBudget, info: EngineInfo
) -> StepPlan | None:
    """What is left to prefill of all that run, behind `chunks`, which prefill; it may take more. None where
    someone decodes in between."""
    under_way = {id(chunk.sequence): chunk for chunk in chunks}
    plan = StepPlan()
    for sequence in running:
        chunk = under_way.get(id(sequence))
        if chunk is not None and chunk.samples:
            if not _ends_behind(chunk, info):
                return None
            continue
        start = sequence.num_computed_tokens if chunk is None else chunk.end
        if start >= sequence.prefill_end_tokens:
            return None
        budget.fill(plan, sequence, start)
    return plan


def _ends_behind(chunk: Chunk, info: EngineInfo) -> bool:
    """Whether the token that is drawn after the chunk is its sequence's last here, whatever it is."""
    sequence = chunk.sequence
    return sequence.purpose is Purpose.PREFILL_ONLY or sequence.ends_with_length(
        chunk.end + 1, info.max_model_len
    )
