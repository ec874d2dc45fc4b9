"""How the next token is drawn from the model's logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from kvrelay.core.errors import InvalidRequest

MAX_STOP_TOKENS: Final = 64
MAX_LOGPROBS: Final = 20
MAX_SEED: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's sampling parameters, validated when built.

    Order of operations: repetition, presence and frequency penalties on the raw logits; temperature;
    then top-k, top-p and min-p; then one draw by the Gumbel-max trick, whose noise is a function of
    (seed, absolute position of the drawn token) alone.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 and `min_p` 0 are off. `seed` None means that the
    router draws one when it accepts the request, so that every attempt samples alike.
    `max_tokens` counts all output tokens, those of earlier attempts included.
    `num_logprobs` None: no logprobs; 0: only the chosen token's; k: also the k likeliest tokens', from
    the log-softmax of the raw logits, before penalties and temperature.

    Raises:
        InvalidRequest: a parameter is out of range; `field` is ``sampling.<name>``.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None

    def __post_init__(self) -> None:
        _require_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _require_float("temperature", self.temperature, 0.0, 100.0)
        _require_int("top_k", self.top_k, 0, 2**31 - 1)
        _require_float("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequest("sampling.top_p must be above 0", field="sampling.top_p")
        _require_float("min_p", self.min_p, 0.0, 1.0)
        _require_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _require_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _require_int("seed", self.seed, 0, MAX_SEED)
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise InvalidRequest(
                f"sampling.stop_token_ids has {len(self.stop_token_ids)} entries, at most {MAX_STOP_TOKENS}",
                field="sampling.stop_token_ids",
            )
        for token_id in self.stop_token_ids:
            _require_int("stop_token_ids", token_id, 0, 2**31 - 1)
        if self.num_logprobs is not None:
            _require_int("num_logprobs", self.num_logprobs, 0, MAX_LOGPROBS)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _require_int(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(
            f"sampling.{name} must be an integer from {low} to {high}, got {value!r}",
            field=f"sampling.{name}",
        )


def _require_float(name: str, value: float, low: float, high: float) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise InvalidRequest(
            f"sampling.{name} must be a number from {low:g} to {high:g}, got {value!r}",
            field=f"sampling.{name}",
        )
