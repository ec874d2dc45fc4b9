"""How far one request has come, over all its attempts, and whether a failed one is to be repeated.

Pure: time and randomness are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from kvrelay.client.config import ClientConfig
from kvrelay.core.client_types import CallFinished, GenerateCall
from kvrelay.core.errors import DuplicateRequest, KVRelayError, RouterUnavailable
from kvrelay.core.request import TokenLogprobs
from kvrelay.core.service_terms import ServiceTerms


@dataclass(slots=True)
class RequestProgress:
    """One request's output so far. `started_s` and `arrivals_s` (one per token) are on one clock."""

    call: GenerateCall
    started_s: float
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    num_attempts: int = 0
    num_retries: int = 0
    num_continuations: int = 0
    num_failures_in_row: int = 0

    @property
    def deadline_s(self) -> float | None:
        """When the caller's patience ends, on the clock of `started_s`."""
        return None if self.call.timeout_s is None else self.started_s + self.call.timeout_s

    @property
    def _patience_s(self) -> float:
        """When another attempt is of no use."""
        deadline_s = math.inf if self.deadline_s is None else self.deadline_s
        ttft_timeout_s = self.call.terms.ttft_timeout_s
        if self.token_ids or ttft_timeout_s is None:
            return deadline_s
        return min(deadline_s, self.started_s + ttft_timeout_s)

    def take(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs | None],
        arrivals_s: Sequence[float],
    ) -> None:
        """Append the next tokens. `logprobs` is empty, or has one entry per token.

        Raises:
            KVRelayError: more came than `max_tokens` allows.
        """
        most = self.call.request.sampling.max_tokens
        if len(self.token_ids) + len(token_ids) > most:
            raise KVRelayError(f"the router sent more tokens than sampling.max_tokens ({most})")
        self.token_ids += token_ids
        self.arrivals_s += arrivals_s
        if self.call.request.sampling.num_logprobs is not None:
            self.logprobs += logprobs or [None] * len(token_ids)
        self.num_failures_in_row = 0

    def next_call(self, now_s: float) -> GenerateCall:
        """What the next attempt asks for: the request, or its continuation, with the time that is left."""
        self.num_attempts += 1
        deadline_s = self.deadline_s
        return replace(
            self.call,
            request=self.call.request.continued_with(tuple(self.token_ids)),
            timeout_s=None if deadline_s is None else max(deadline_s - now_s, 0.001),
            terms=self._terms_now(now_s),
        )

    def _terms_now(self, now_s: float) -> ServiceTerms:
        """A first token that has come need not come again in time."""
        terms = self.call.terms
        if terms.ttft_timeout_s is None:
            return terms
        if self.token_ids:
            return replace(terms, ttft_timeout_s=None)
        left_s = self.started_s + terms.ttft_timeout_s - now_s
        return replace(terms, ttft_timeout_s=max(left_s, 0.001))

    def check_complete(self, finished: CallFinished) -> KVRelayError | None:
        """What is wrong if the router counts other tokens than came, else None."""
        said, came = finished.report.num_output_tokens, len(self.token_ids)
        if said == came > 0:
            return None
        return RouterUnavailable(f"the router delivered {came} of {said} tokens")

    def pause_before_retry_s(
        self, error: KVRelayError, config: ClientConfig, rng: Random, now_s: float, *, may_switch: bool
    ) -> float:
        """Count a failed attempt; returns how long to wait before the next one.

        With `may_switch` another router may be asked at once, the first time.

        Raises:
            KVRelayError: `error` itself, if it is not to be repeated, too often already, or too late.
        """
        self.num_failures_in_row += 1
        if isinstance(error, DuplicateRequest) and self.num_attempts > 1:
            # Not the caller's fault: the session was lost, and its router has not noticed yet.
            error = RouterUnavailable(f"the router still has an earlier attempt: {error.message}")
        if not error.retryable or self.num_failures_in_row > config.max_retries:
            raise error
        if self.token_ids and self.num_continuations >= config.max_continuations:
            raise error
        pause_s = 0.0
        if not (may_switch and self.num_failures_in_row == 1):
            pause_s = retry_pause_s(self.num_failures_in_row - 1, error, config, rng)
        if now_s + pause_s >= self._patience_s:
            raise error
        if self.token_ids:
            self.num_continuations += 1
        else:
            self.num_retries += 1
        return pause_s


def retry_pause_s(num_earlier: int, error: KVRelayError, config: ClientConfig, rng: Random) -> float:
    """Exponential back-off with jitter, never shorter than the router asked for (within a minute)."""
    whole_s = min(config.backoff_base_s * 2.0 ** min(num_earlier, 30), config.backoff_max_s)
    return max(whole_s * rng.uniform(0.5, 1.0), min(error.retry_after_s or 0.0, 60.0))
