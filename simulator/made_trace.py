"""Traces that are made, not recorded: independent requests with log-normal lengths, of several tenants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvrelay.core.service_terms import DEFAULT_TERMS, ServiceTerms
from kvrelay.simulator.trace import Ints, Trace

_SPREAD = 0.8
"""Standard deviation of the logarithm of lengths."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """Whose requests come, and how many in proportion to those of others."""

    terms: ServiceTerms = DEFAULT_TERMS
    rate: float = 1.0


def make_trace(
    num_requests: int,
    *,
    mean_prompt_tokens: int = 2000,
    mean_output_tokens: int = 200,
    crowds: Sequence[Crowd] = (Crowd(),),
    block_tokens: int = 512,
    seed: int = 0,
) -> Trace:
    """Requests that arrive by chance, one a second on average, and share no prefix. Who asks is drawn for
    each, by the crowds' rates."""
    rng = np.random.default_rng(seed)
    arrivals_s = np.cumsum(rng.exponential(1.0, num_requests))
    prompts = _lengths(rng, num_requests, mean_prompt_tokens, 16)
    outputs = _lengths(rng, num_requests, mean_output_tokens, 2)
    starts = np.concatenate([[0], np.cumsum(-(-prompts // block_tokens))])
    rates = np.array([crowd.rate for crowd in crowds])
    drawn = rng.choice(len(crowds), num_requests, p=rates / rates.sum())
    return Trace(
        name="made",
        arrivals_s=arrivals_s - arrivals_s[0],
        num_prompt_tokens=prompts,
        num_output_tokens=outputs,
        block_tokens=block_tokens,
        block_ids=np.arange(starts[-1]),
        block_starts=starts,
        terms=tuple(crowds[index].terms for index in drawn.tolist()),
    )


def _lengths(rng: np.random.Generator, number: int, mean: int, least: int) -> Ints:
    """At most 16 times the mean."""
    lengths = rng.lognormal(np.log(mean) - _SPREAD**2 / 2, _SPREAD, number)
    clipped: Ints = np.clip(lengths, least, 16 * mean).astype(np.int64)
    return clipped
