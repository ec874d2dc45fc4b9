"""A trace of requests in columns, and how its arrivals are compressed to a load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.errors import ConfigError
from kvrelay.core.service_terms import DEFAULT_TERMS, ServiceTerms
from kvrelay.simulator.cost_model import PrefillModel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests by arrival. Columns ``[num_requests]``: `arrivals_s` never falls and begins with 0.

    The blocks of request i are ``block_ids[block_starts[i] : block_starts[i + 1]]``: an id names the whole
    prefix up to and including its block of `block_tokens` tokens; the last block may be part of one. Requests
    that share no prefix share no id. `terms` is empty, or has whose each request is, and how urgent.
    """

    name: str
    arrivals_s: Floats
    num_prompt_tokens: Ints
    num_output_tokens: Ints
    block_tokens: int
    block_ids: Ints
    block_starts: Ints
    terms: Sequence[ServiceTerms] = ()

    def __len__(self) -> int:
        return len(self.arrivals_s)

    def blocks_of(self, index: int) -> list[int]:
        """The block ids of one request, first to last."""
        ids: list[int] = self.block_ids[self.block_starts[index] : self.block_starts[index + 1]].tolist()
        return ids

    def terms_of(self, index: int) -> ServiceTerms:
        """Whose one request is, and how urgent."""
        return self.terms[index] if self.terms else DEFAULT_TERMS

    def first(self, num_requests: int) -> Trace:
        """Only the first so many requests."""
        num = min(num_requests, len(self))
        return replace(
            self,
            arrivals_s=self.arrivals_s[:num],
            num_prompt_tokens=self.num_prompt_tokens[:num],
            num_output_tokens=self.num_output_tokens[:num],
            block_ids=self.block_ids[: int(self.block_starts[num])],
            block_starts=self.block_starts[: num + 1],
            terms=self.terms[:num],
        )


def compress_arrivals(trace: Trace, load: float, num_prefill_nodes: int, model: PrefillModel) -> Trace:
    """The trace with its arrivals moved closer, or apart, so that prefill without any cache would keep the
    nodes busy for a share `load` of the time from the first arrival to the last.

    Raises:
        ConfigError: all requests arrive at one moment, so that there is nothing to scale.
    """
    span_s = float(trace.arrivals_s[-1])
    if span_s <= 0.0:
        raise ConfigError(
            f"trace {trace.name}: all requests have the same time of arrival, which can't be"
            " compressed to a load",
            field="TRACE",
        )
    no_cache = np.zeros(len(trace), np.int64)
    total_s = float(model.seconds(trace.num_prompt_tokens, no_cache).sum())
    scale = total_s / (num_prefill_nodes * load) / span_s
    return replace(trace, arrivals_s=trace.arrivals_s * scale)
