"""The tokens that wait to be told to one router."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvrelay.core.request import TokenLogprobs


@dataclass(slots=True)
class TokenColumns:
    """A `TokenBatch` while it grows. `logprobs` is empty, or has one entry per token."""

    attempts: list[int] = field(default_factory=list)
    first_indices: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    def append(self, attempt: int, index: int, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """One token of one attempt."""
        if logprobs is not None or self.logprobs:
            self._pad_logprobs()
            self.logprobs.append(logprobs)
        self.attempts.append(attempt)
        self.first_indices.append(index)
        self.counts.append(1)
        self.token_ids.append(token_id)

    def extend(self, other: TokenColumns) -> None:
        """Append all of `other`."""
        if other.logprobs or self.logprobs:
            self._pad_logprobs()
            self.logprobs.extend(other.logprobs or [None] * len(other.token_ids))
        self.attempts.extend(other.attempts)
        self.first_indices.extend(other.first_indices)
        self.counts.extend(other.counts)
        self.token_ids.extend(other.token_ids)

    def _pad_logprobs(self) -> None:
        self.logprobs.extend([None] * (len(self.token_ids) - len(self.logprobs)))
