"""How long answers are, in tokens and as shares of what requests allow; learned from those that have ended.

Both count: who allows little often gets all of it, and who allows as much as the context holds means no
limit. The lesser of the two is believed.
"""

from __future__ import annotations

import math
from typing import Final

from kvrelay.core.request import TokenRequest

_LOW: Final = 0.1
"""One answer in ten is shorter than the low estimate."""
_STEP: Final = 0.02
_LOG_STEP: Final = 5.0
"""Of tokens the order of magnitude is sought, so that steps are of their logarithm."""


class OutputLengths:
    """See the module. Before anything was seen, an answer is expected to be as long as it may, and may be as
    short as one token."""

    def __init__(self) -> None:
        self._mean_share = 1.0
        self._mean_tokens = math.inf
        self._low_share = 0.0
        self._low_tokens = 1.0
        self._num_observed = 0

    def observe(self, request: TokenRequest, num_output_tokens: int) -> None:
        """An answer came to its end; requests that forbid an early end tell nothing."""
        if request.sampling.ignore_eos or num_output_tokens < 1:
            return
        share = min(1.0, num_output_tokens / request.sampling.max_tokens)
        self._num_observed += 1
        step = max(_STEP, 1.0 / self._num_observed)
        self._mean_share += step * (share - self._mean_share)
        before = self._mean_tokens if self._num_observed > 1 else num_output_tokens
        self._mean_tokens = before + step * (num_output_tokens - before)
        self._low_share += step * (_LOW if share >= self._low_share else _LOW - 1.0)
        self._low_share = min(max(self._low_share, 0.0), 1.0)
        move = _LOW if num_output_tokens >= self._low_tokens else _LOW - 1.0
        self._low_tokens = max(1.0, self._low_tokens * math.exp(_LOG_STEP * step * move))

    def expected(self, request: TokenRequest) -> float:
        """Tokens that are still to come, on average; at least 1."""
        return self._left(request, self._mean_share, self._mean_tokens)

    def at_least(self, request: TokenRequest) -> float:
        """Tokens that are still to come with nine answers out of ten; at least 1."""
        return self._left(request, self._low_share, self._low_tokens)

    def _left(self, request: TokenRequest, share: float, most: float) -> float:
        if request.sampling.ignore_eos:
            return max(1.0, request.num_remaining_tokens)
        total = max(min(share * request.sampling.max_tokens, most), request.sampling.min_tokens)
        return max(1.0, total - request.num_output_tokens)
