"""How long a step that decodes and prefills will take, learnt from those that were measured.

A node that promises an inter-token latency may add only so much prefill to a step that decodes. What that
is depends on model, device, context lengths and whoever else uses the device, so it is not configured but
fitted, step by step, to

    step_s = prefill token * tokens + attended key * keys + decode row * rows + context token * tokens + base

by least squares of the *relative* error with exponential forgetting, no coefficient below zero. A pause of
two seconds is a relative error of at most one and so weighs no more than any other step. What all steps of
late have in common beyond the fit (the device got busy, the fit is still poor) is a factor, `drift`.

Only steps that do both are learnt from. A decode step alone is another program (a captured graph, launched
ahead), and a prefill step that draws nothing may return before the device is done.

Pure: no torch, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FIRST_CHUNK_TOKENS: Final = 32
"""Prefill tokens that the first step may take; at most twice as many as were measured, from then on."""
_REMEMBERED: Final = 0.98
"""Weight of the past after each step: about 50 steps count."""
_DRIFT_GAIN: Final = 0.2
_DRIFT_RANGE: Final = (0.5, 2.0)
_DOUBT: Final = 0.005
_DOUBT_WHEN_STUCK: Final = 0.03
"""Share by which a prefill token's and key's cost shrinks where steps of one size can't tell it from the
base's; more where that seems to be so. Chunks then grow until they do tell. Without it they could stay at
one size, be it ever so small."""
_STUCK_BELOW: Final = 0.9
_NUM_SWEEPS: Final = 3
_SHORTEST_STEP_S: Final = 1e-6
_NUM_FEATURES: Final = 5
_NUM_DOUBTED: Final = 2
_FEATURES: Final = range(_NUM_FEATURES)


@dataclass(slots=True)
class StepShape:
    """What a step's time depends on. Mutable: a plan adds its chunks one by one.

    `num_attended_keys` are those of the prefill tokens: each attends to all the tokens before it.
    """

    num_prefill_tokens: int = 0
    num_attended_keys: float = 0.0
    num_decode_rows: int = 0
    num_decode_context_tokens: int = 0

    def add(self, start: int, num_tokens: int, *, is_prefill: bool) -> None:
        """Tokens ``[start, start + num_tokens)`` of one sequence are computed too."""
        if is_prefill:
            self.num_prefill_tokens += num_tokens
            self.num_attended_keys += num_tokens * (start + num_tokens / 2)
        else:
            self.num_decode_rows += num_tokens
            self.num_decode_context_tokens += start

    @property
    def is_mixed(self) -> bool:
        """Whether the step prefills beside a decode."""
        return self.num_prefill_tokens > 0 and self.num_decode_rows > 0


class StepCost:
    """The fit, and what it allows a step that has to end `within_s`. See the module's text."""

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        # The order is that of the coordinate descent: what can explain a time first, does so. Before there
        # is enough data a chunk is thus thought to cost in proportion to its tokens, the base nothing, which
        # errs on the safe side.
        self._coefficients_s = [0.0] * _NUM_FEATURES
        self._products = [[0.0] * _NUM_FEATURES for _ in _FEATURES]
        self._sums = [0.0] * _NUM_FEATURES
        self._drift = 1.0
        self._most_tokens = float(FIRST_CHUNK_TOKENS)

    @property
    def coefficients_s(self) -> tuple[float, ...]:
        """Seconds a prefill token, attended key, decode row and context token, and of an empty step."""
        return tuple(self._coefficients_s)

    def predict_s(self, shape: StepShape) -> float:
        """Seconds that a step will take; 0.0 before anything was measured."""
        return self._drift * self._fitted_s(_features(shape))

    def max_prefill_tokens(self, shape: StepShape, start: int) -> int:
        """How many tokens of a prompt, from `start`, may join `shape` so that the step ends in time.

        May be none, and never makes a step more than twice as large as the largest one measured.
        """
        most = int(max(self._most_tokens, FIRST_CHUNK_TOKENS)) - shape.num_prefill_tokens
        token_s, key_s = self._coefficients_s[:2]
        left_s = self._within_s / self._drift - self._fitted_s(_features(shape))
        if most <= 0 or left_s <= 0.0:
            return 0
        # key_s / 2 * n^2 + next_token_s * n = left_s, solved in the form that allows key_s = 0.
        next_token_s = token_s + key_s * start
        divisor_s = next_token_s + (next_token_s**2 + 2.0 * key_s * left_s) ** 0.5
        return most if 2.0 * left_s >= most * divisor_s else int(2.0 * left_s / divisor_s)

    def observe(self, shape: StepShape, step_s: float) -> None:
        """A step of that shape took so long. Ignored unless it was mixed."""
        if not shape.is_mixed:
            return
        step_s = max(step_s, _SHORTEST_STEP_S)
        features = _features(shape)
        fitted_s = self._fitted_s(features)
        if fitted_s > 0.0:
            low, high = _DRIFT_RANGE
            ratio = min(high, max(low, step_s / fitted_s))
            self._drift += _DRIFT_GAIN * (ratio - self._drift)
        self._remember([feature / step_s for feature in features])
        doubt = _DOUBT_WHEN_STUCK if self._seems_stuck(features, step_s) else _DOUBT
        for _ in range(_NUM_SWEEPS):
            self._descend(doubt)
        self._most_tokens = max(_REMEMBERED * self._most_tokens, 2.0 * shape.num_prefill_tokens)

    def _seems_stuck(self, features: tuple[float, ...], step_s: float) -> bool:
        """Whether a step left time that, by the fit, could not have taken as much prefill again."""
        if step_s > _STUCK_BELOW * self._within_s:
            return False
        num_tokens, num_keys, *others = features
        return self._drift * self._fitted_s((2 * num_tokens, 2 * num_keys, *others)) > self._within_s

    def _fitted_s(self, features: tuple[float, ...]) -> float:
        return sum(map(float.__mul__, self._coefficients_s, features))

    def _remember(self, scaled: list[float]) -> None:
        """Add a step to the normal equations of ``scaled . coefficients = 1``."""
        for row, sum_index, value in zip(self._products, _FEATURES, scaled, strict=True):
            self._sums[sum_index] = _REMEMBERED * self._sums[sum_index] + value
            for column, other in enumerate(scaled):
                row[column] = _REMEMBERED * row[column] + value * other

    def _descend(self, doubt: float) -> None:
        """One sweep of coordinate descent, which meets the bound at zero exactly."""
        coefficients_s = self._coefficients_s
        for index, row in enumerate(self._products):
            if row[index] > 0.0:
                rest = self._sums[index] - sum(map(float.__mul__, row, coefficients_s))
                best_s = coefficients_s[index] + rest / row[index]
                coefficients_s[index] = max(0.0, best_s / (1.0 + doubt if index < _NUM_DOUBTED else 1.0))


def _features(shape: StepShape) -> tuple[float, ...]:
    return (
        float(shape.num_prefill_tokens),
        float(shape.num_attended_keys),
        float(shape.num_decode_rows),
        float(shape.num_decode_context_tokens),
        1.0,
    )
