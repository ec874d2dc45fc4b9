"""How long answers are, as shares of what requests allow; learned from those that have ended."""

from __future__ import annotations

from typing import Final

from kvrelay.core.request import TokenRequest

_LOW: Final = 0.1
"""One answer in ten is shorter than the low estimate."""
_STEP: Final = 0.02


class OutputLengths:
    """See the module. Before anything was seen, an answer is expected to be as long as it may, and may be as
    short as one token."""

    def __init__(self) -> None:
        self._mean_share = 1.0
        self._low_share = 0.0
        self._num_observed = 0

    def observe(self, request: TokenRequest, num_output_tokens: int) -> None:
        """An answer came to its end; requests that forbid an early end tell nothing."""
        if request.sampling.ignore_eos:
            return
        share = min(1.0, num_output_tokens / request.sampling.max_tokens)
        self._num_observed += 1
        step = max(_STEP, 1.0 / self._num_observed)
        self._mean_share += step * (share - self._mean_share)
        self._low_share += step * (_LOW if share >= self._low_share else _LOW - 1.0)
        self._low_share = min(max(self._low_share, 0.0), 1.0)

    def expected(self, request: TokenRequest) -> float:
        """Tokens that are still to come, on average; at least 1."""
        return self._left(request, self._mean_share)

    def at_least(self, request: TokenRequest) -> float:
        """Tokens that are still to come with nine answers out of ten; at least 1."""
        return self._left(request, self._low_share)

    def _left(self, request: TokenRequest, share: float) -> float:
        if request.sampling.ignore_eos:
            return max(1.0, request.num_remaining_tokens)
        total = max(share * request.sampling.max_tokens, request.sampling.min_tokens)
        return max(1.0, total - request.num_output_tokens)
