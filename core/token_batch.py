"""The tokens of one engine step, as they travel from a node to a router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.core.request import TokenLogprobs


@dataclass(slots=True)
class TokenBatch:
    """The tokens of one engine step, in columns: entry i is `counts[i]` tokens of `attempts[i]`, the first
    of which has output index `first_indices[i]`; `token_ids` holds all of them in a row.

    `logprobs` is empty, or holds one entry per token (None where none was asked for).

    In steady decode a step's *rows* (attempts and counts) are those of the step before, and so many tokens
    further on. Such a batch has the very columns of the earlier one, and a `step` higher by one.
    """

    attempts: Sequence[int] = ()
    start_indices: Sequence[int] = ()
    counts: Sequence[int] = ()
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs | None] = ()
    step: int = 0
    """How often these rows have gone on since `start_indices`."""

    @property
    def first_indices(self) -> Sequence[int]:
        """The output index of each entry's first token."""
        if self.step == 0:
            return self.start_indices
        starts, step = self.start_indices, self.step
        return [start + step * count for start, count in zip(starts, self.counts, strict=True)]

    def next_step(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None] = ()
    ) -> TokenBatch:
        """The same rows, one step further; shares this batch's columns."""
        return TokenBatch(self.attempts, self.start_indices, self.counts, token_ids, logprobs, self.step + 1)

    def is_next_step_of(self, other: TokenBatch) -> bool:
        """Whether it comes from `other` by `next_step`, as far as that shows without a look at the rows."""
        return (
            self.step == other.step + 1
            and self.attempts is other.attempts
            and self.start_indices is other.start_indices
            and self.counts is other.counts
        )
