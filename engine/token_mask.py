"""Which tokens a sequence may draw next, where not all of them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from kvrelay.engine.grammar import GrammarMatcher
from kvrelay.engine.sequence import LiveSequence


def allowed_tokens(sequence: LiveSequence, eos_token_ids: Collection[int], vocab_size: int) -> Tensor | None:
    """``[vocab_size]`` bool; None: all. Moves the sequence's matcher, its `executor_state`, on to the end of
    its tokens.

    Raises:
        InvalidRequest: the grammar has met a limit.
    """
    matcher = sequence.executor_state
    sampling = sequence.request.sampling
    allowed: Tensor | None = None
    if isinstance(matcher, GrammarMatcher):
        matcher.take(sequence.token_ids[sequence.request.num_prompt_tokens + matcher.num_tokens :])
        allowed = matcher.allowed()
    if sequence.num_output_tokens >= sampling.min_tokens:
        return allowed
    ends = [item for item in {*eos_token_ids, *sampling.stop_token_ids} if item < vocab_size]
    longer = torch.ones(vocab_size, dtype=torch.bool) if allowed is None else allowed.clone()
    longer[ends] = False
    # A grammar that can only end here does end.
    return longer if allowed is None or bool(longer.any()) else allowed
