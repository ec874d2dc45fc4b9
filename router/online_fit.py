"""A linear model that is fitted to one observation after another, each soon forgotten a little.

Errors count relative to what was expected, so that short and long work weigh alike; one that is far outside
what errors have been is cut to that, so that a single stall teaches little, and a lasting change all of it.

Source: recursive least squares with exponential forgetting (Haykin, Adaptive Filter Theory, ch. 10); the cut
is Huber's.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul
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
_MIN_VARIANCE: Final = 1e-12
_LOST_ERROR: Final = 0.8
_NUM_BEFORE_LOST: Final = 100
"""A model that is off by so much after so many observations is started anew: noise is less."""
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
        self._scale = tuple(map(float, prior))
        self._floor = floor
        self.num_observed = 0
        self._start()

    def _start(self) -> None:
        """From the prior, as if nothing had been observed."""
        self._theta = [1.0] * len(self._scale)
        self._covariance = self._first_covariance(_PRIOR_VARIANCE)
        self.coefficients = self._scale
        self._num_since_start = 0
        self.relative_error = 0.1
        """Running mean of how far expectations were off, as a share of them."""

    def _first_covariance(self, variance: float) -> list[list[float]]:
        size = range(len(self._scale))
        return [[variance if row == column else 0.0 for column in size] for row in size]

    def expected(self, features: Sequence[float]) -> float:
        """What the model says of these features, at least `floor`."""
        total: float = sum(map(mul, self.coefficients, features))
        return max(total, self._floor)

    def observe(self, features: Sequence[float], measured: float) -> None:
        """Learn from one measurement; one that is negative or not finite is ignored. To `relative_error` none
        adds more than a whole: the prior may be wrong by orders of magnitude."""
        if not 0.0 <= measured < float("inf"):
            return
        expected = self.expected(features)
        x = [feature * scale / expected for feature, scale in zip(features, self._scale, strict=True)]
        error = measured / expected - sum(map(mul, self._theta, x))
        off = min(abs(measured / expected - 1.0), 1.0)
        if self._num_since_start >= _NUM_UNCUT:
            bound = _CUT_AT_ERRORS * self.relative_error + 1e-6
            error, off = max(-bound, min(bound, error)), min(off, 2.0 * bound)
        weight = max(1.0 - _ERROR_MEMORY, 1.0 / (self._num_since_start + 1))
        self.relative_error += weight * (off - self.relative_error)
        self.num_observed += 1
        self._num_since_start += 1
        if self.relative_error > _LOST_ERROR and self._num_since_start > _NUM_BEFORE_LOST:
            self._start()
        else:
            self._step(x, error)

    def _step(self, x: list[float], error: float) -> None:
        """With three coefficients arrays would take several times as long as numbers."""
        spread = [sum(map(mul, row, x)) for row in self._covariance]
        known = sum(map(mul, x, spread))
        if known < 0.0:  # rounding has spoilt the covariance: what was learned stays, how surely is unknown
            self._covariance = self._first_covariance(1.0)
            return
        divisor = _MEMORY + known
        self._theta = [
            theta + of_one / divisor * error for theta, of_one in zip(self._theta, spread, strict=True)
        ]
        # Each product is the same as its mirror image, so that the matrix stays symmetric.
        covariance = [
            [(value - of_one * other / divisor) / _MEMORY for value, other in zip(row, spread, strict=True)]
            for row, of_one in zip(self._covariance, spread, strict=True)
        ]
        for index, row in enumerate(covariance):
            row[index] = max(row[index], _MIN_VARIANCE)
        trace = sum(row[index] for index, row in enumerate(covariance))
        if trace > _MAX_VARIANCE:
            shrink = _MAX_VARIANCE / trace
            covariance = [[value * shrink for value in row] for row in covariance]
        self._covariance = covariance
        self.coefficients = tuple(max(0.0, value) for value in map(mul, self._theta, self._scale))


def is_sample(serial: int, num_observed: int) -> bool:
    """Whether request `serial` is to be learned from where that costs more than it tells: after the first few
    dozen, one in four."""
    return num_observed < _NUM_ALL_COUNT or serial % 4 == 0
