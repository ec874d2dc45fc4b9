"""A linear model that is fitted to one observation after another, each soon forgotten a little.

Errors count relative to what was expected, so that short and long work weigh alike; one that is far outside
what errors have been is cut to that, so that a single stall teaches little, and a lasting change all of it.

Source: recursive least squares with exponential forgetting (Haykin, Adaptive Filter Theory, ch. 10); the cut
is Huber's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_MEMORY: Final = 0.998
"""What one observation later is left of another's weight: some 500 count."""
_PRIOR_VARIANCE: Final = 100.0
"""Of the coefficients, as shares of the prior: it gives way to the first measurements."""
_NUM_UNCUT: Final = 20
"""The first observations may be anywhere: the prior is a guess."""
_NUM_ALL_COUNT: Final = 64
_CUT_AT_ERRORS: Final = 4.0
_ERROR_MEMORY: Final = 0.98
_MAX_VARIANCE: Final = 1e4
"""Bounds what is unknown in a direction that is never observed, which forgetting would let grow for ever."""


class OnlineFit:
    """``y ~ coefficients @ x``, all coefficients at least 0.

    `prior` is the first guess of the coefficients; all must be above 0. `floor` is the least that is ever
    expected, so that relative errors stay finite.
    """

    def __init__(self, prior: Sequence[float], floor: float) -> None:
        assert min(prior) > 0
        assert floor > 0
        self._scale: Floats = np.array(prior, dtype=np.float64)
        self._theta: Floats = np.ones(len(prior))
        self._covariance: Floats = np.eye(len(prior)) * _PRIOR_VARIANCE
        self._floor = floor
        self.coefficients: Floats = self._scale.copy()
        """Read only."""
        self._weights: list[float] = self.coefficients.tolist()
        self.num_observed = 0
        self.relative_error = 0.1
        """Running mean of how far expectations were off, as a share of them."""

    def expected(self, features: Sequence[float]) -> float:
        """What the model says of these features, at least `floor`."""
        total = 0.0
        for weight, feature in zip(self._weights, features, strict=True):
            total += weight * feature
        return total if total > self._floor else self._floor

    def observe(self, features: Sequence[float], measured: float) -> None:
        """Learn from one measurement; one that is negative or not finite is ignored. To `relative_error` none
        adds more than a whole: the prior may be wrong by orders of magnitude."""
        if not 0.0 <= measured < float("inf"):
            return
        expected = self.expected(features)
        x = np.array(features) * self._scale / expected
        error = measured / expected - float(self._theta @ x)
        off = min(abs(measured / expected - 1.0), 1.0)
        if self.num_observed >= _NUM_UNCUT:
            bound = _CUT_AT_ERRORS * self.relative_error + 1e-6
            error, off = max(-bound, min(bound, error)), min(off, 2.0 * bound)
        weight = max(1.0 - _ERROR_MEMORY, 1.0 / (self.num_observed + 1))
        self.relative_error += weight * (off - self.relative_error)
        self.num_observed += 1
        self._step(x, error)

    def _step(self, x: Floats, error: float) -> None:
        spread = self._covariance @ x
        gain = spread / (_MEMORY + float(x @ spread))
        self._theta = self._theta + gain * error
        covariance = (self._covariance - np.outer(gain, spread)) / _MEMORY
        largest = float(covariance.trace())
        self._covariance = covariance * min(1.0, _MAX_VARIANCE / largest) if largest > 0 else covariance
        self.coefficients = np.maximum(self._theta * self._scale, 0.0)
        self._weights = self.coefficients.tolist()


def is_sample(serial: int, num_observed: int) -> bool:
    """Whether request `serial` is to be learned from where that costs more than it tells: after the first few
    dozen, one in four."""
    return num_observed < _NUM_ALL_COUNT or serial % 4 == 0
