"""What prefill and pulls take, learned from what the nodes report; nothing here is set by hand.

Prefill of `new` tokens behind `cached` ones is a constant, plus so much for each new token (matrix products),
plus so much for each pair of a new token and one that it attends to. The three coefficients are one model for
nodes of one kind, and each node has a factor to it, so that a slow node shows after a few prefills and a new
node starts from what the others taught.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvrelay.router.online_fit import Floats, OnlineFit

Ints = NDArray[np.int64]

_PREFILL_PRIOR: Final = (0.005, 2.5e-5, 1e-9)
"""Seconds: of a prefill, of a token, of a pair. An 8B model on one H100, roughly."""
_PULL_PRIOR: Final = (0.003, 5e-6)
"""Seconds: of a pull, of a token."""
_MIN_SECONDS: Final = 1e-4
_FACTOR_MEMORY: Final = 0.9
_MAX_STEP: Final = 2.0
"""One prefill tells of at most so many times what was expected of its node: a stall is no slow node."""
_FACTOR_PRIOR_S: Final = 1.0
"""A node's factor is 1 until about so many seconds of computing speak against it."""
_SAME_WITHIN_ERRORS: Final = 3.0
_SAME_WITHIN: Final = 0.1
"""Nodes that differ by no more than so many times what predictions are off by, or by this share, whichever is
less, count as alike: else the one that happens to look best would get all that could go anywhere, and its
cache would lose what it holds."""
_MAX_FACTOR: Final = 100.0


class PrefillCosts:
    """Seconds of prefill by node slot, ``0 <= slot < num_slots``; `resize` makes room for more."""

    def __init__(self, num_slots: int) -> None:
        self._fit = OnlineFit(_PREFILL_PRIOR, _MIN_SECONDS)
        self._measured_s: Floats = np.zeros(num_slots)
        self._expected_s: Floats = np.zeros(num_slots)
        self._factors: Floats = np.ones(num_slots)

    @property
    def relative_error(self) -> float:
        """How far expectations were off lately, as a share of them."""
        return self._fit.relative_error

    @property
    def num_observed(self) -> int:
        """Prefills that were learned from."""
        return self._fit.num_observed

    @property
    def token_seconds(self) -> float:
        """Seconds of a token in a long prompt without context, on a node whose factor is 1."""
        return self._fit.coefficients[1]

    def resize(self, num_slots: int) -> None:
        """Keep what is known of the slots so far."""
        more = num_slots - len(self._factors)
        self._measured_s = np.concatenate([self._measured_s, np.zeros(more)])
        self._expected_s = np.concatenate([self._expected_s, np.zeros(more)])
        self._factors = np.concatenate([self._factors, np.ones(more)])

    def forget(self, slot: int) -> None:
        """Another node takes this slot."""
        self._measured_s[slot] = self._expected_s[slot] = 0.0
        self._factors[slot] = 1.0

    def seconds(self, num_tokens: int, cached: Ints, slots: slice = slice(None)) -> Floats:
        """Seconds to prefill `num_tokens` tokens of which node slot i has ``cached[i]`` already."""
        return self.typical_seconds(num_tokens, cached) * self._factors[slots]

    def typical_seconds(self, num_tokens: int, cached: Ints) -> Floats:
        """The same on a node whose factor is 1."""
        base_s, token_s, pair_s = self._fit.coefficients
        seconds: Floats = np.multiply(pair_s * 0.5, cached + num_tokens, dtype=np.float64)
        seconds += token_s
        seconds *= num_tokens - cached
        seconds += base_s
        return np.maximum(seconds, _MIN_SECONDS, out=seconds)

    def typical_one(self, num_tokens: int, num_cached: int) -> float:
        """The same for one prompt of which so many tokens are cached."""
        new = num_tokens - num_cached
        return self._fit.expected((1.0, float(new), 0.5 * new * (num_cached + num_tokens)))

    @property
    def base_seconds(self) -> float:
        """Seconds of a prefill that has hardly anything to compute, on a node whose factor is 1."""
        return self._fit.coefficients[0]

    def observe(self, slot: int, work: Sequence[tuple[int, int]], measured_s: float) -> None:
        """A node computed prompts together, of each so many new tokens behind so many cached ones."""
        num_new = sum(new for new, _ in work)
        if num_new < 1 or not 0.0 <= measured_s < float("inf"):
            return
        features = (1.0, float(num_new), sum(new * (cached + 0.5 * new) for new, cached in work))
        expected_s = self._fit.expected(features)
        factor = float(self._factors[slot])
        self._fit.observe(features, measured_s / factor)
        usual_s = expected_s * factor
        self._measured_s[slot] *= _FACTOR_MEMORY
        self._measured_s[slot] += min(max(measured_s, usual_s / _MAX_STEP), usual_s * _MAX_STEP)
        self._expected_s[slot] = self._expected_s[slot] * _FACTOR_MEMORY + expected_s
        self._factors[slot] = self._factor(slot)

    def _factor(self, slot: int) -> float:
        """The node's measured over expected time, relative to that of all nodes together."""
        all_nodes = float(self._measured_s.sum() / self._expected_s.sum())
        expected_s = float(self._expected_s[slot]) * all_nodes
        ratio = (float(self._measured_s[slot]) + _FACTOR_PRIOR_S) / (expected_s + _FACTOR_PRIOR_S)
        if abs(ratio - 1.0) <= min(_SAME_WITHIN_ERRORS * self.relative_error, _SAME_WITHIN):
            return 1.0
        return min(max(ratio, 1.0 / _MAX_FACTOR), _MAX_FACTOR)


class PullCosts:
    """Seconds to pull KV from one prefill node to another, the same for all pairs."""

    def __init__(self) -> None:
        self._fit = OnlineFit(_PULL_PRIOR, 1e-9)

    def seconds(self, num_tokens: Ints) -> Floats:
        """Seconds to pull so many tokens' KV each; 0 for none."""
        base_s, token_s = self._fit.coefficients
        seconds: Floats = np.multiply(num_tokens, token_s, dtype=np.float64)
        seconds += base_s
        seconds *= num_tokens > 0
        return seconds

    def observe(self, num_tokens: int, measured_s: float) -> None:
        """A pull of so many tokens took so long."""
        if num_tokens > 0:
            self._fit.observe((1.0, float(num_tokens)), measured_s)
