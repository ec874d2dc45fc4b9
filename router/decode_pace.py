"""How long a decode step takes, by what runs beside it; learned from answers that have ended.

A step takes a constant, plus so much for each sequence of the batch, plus so much for each token of KV that
is read. An answer tells the mean time between its tokens; what ran meanwhile is known from this router's
books, averaged over the answer's life and over the decode nodes. Nothing is done per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvrelay.router.online_fit import OnlineFit, is_sample

_PRIOR: Final = (0.008, 2e-5, 4e-8)
"""Seconds: of a step, of a sequence, of a token of context. An 8B model on one H100, roughly."""
_MIN_SECONDS: Final = 1e-5
_MIN_STEPS: Final = 4
"""Shorter answers tell more of their handoff than of decoding."""


@dataclass(slots=True, eq=False)
class _Stream:
    """One sequence, and what the integrals were when it began."""

    num_tokens: int
    since_s: float
    batch_s: float
    context_s: float


class DecodePace:
    """See the module. Batch and context are of one node."""

    def __init__(self) -> None:
        self._num_nodes = 1
        self._fit = OnlineFit(_PRIOR, _MIN_SECONDS)
        self._streams: dict[int, _Stream] = {}
        self._num_context_tokens = 0
        self._next_step_s: float | None = None
        self._now_s = 0.0
        self._batch_s = 0.0
        self._context_s = 0.0

    @property
    def num_nodes(self) -> int:
        """The decode nodes, kept up to date by the owner; at least 1."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, number: int) -> None:
        assert number >= 1
        self._num_nodes = number
        self._next_step_s = None

    @property
    def num_streams(self) -> int:
        """Sequences that decode."""
        return len(self._streams)

    @property
    def num_context_tokens(self) -> int:
        """Of all of them."""
        return self._num_context_tokens

    @property
    def relative_error(self) -> float:
        """How far expectations were off lately, as a share of them."""
        return self._fit.relative_error

    @property
    def num_observed(self) -> int:
        return self._fit.num_observed

    def step_s(self, num_streams: float, num_context_tokens: float) -> float:
        """Seconds of a step beside which so many sequences with so much context run, over all nodes."""
        nodes = self.num_nodes
        return self._fit.expected((1.0, max(1.0, num_streams / nodes), num_context_tokens / nodes))

    def next_step_s(self) -> float:
        """Seconds of a step as things stand, with one sequence more."""
        if self._next_step_s is None:
            self._next_step_s = self.step_s(len(self._streams) + 1, self._num_context_tokens)
        return self._next_step_s

    def begin(self, serial: int, num_tokens: int, now_s: float) -> None:
        """A sequence with so many tokens of context has its first token."""
        self.end(serial, now_s)
        self._advance(now_s)
        self._streams[serial] = _Stream(num_tokens, now_s, self._batch_s, self._context_s)
        self._num_context_tokens += num_tokens

    def end(self, serial: int, now_s: float, num_tokens: int = 0) -> None:
        """A sequence decodes no more, if it did; `num_tokens` is its whole length where its answer is
        complete."""
        stream = self._streams.get(serial)
        if stream is None:
            return
        self._advance(now_s)
        del self._streams[serial]
        self._num_context_tokens -= stream.num_tokens
        elapsed_s = now_s - stream.since_s
        num_steps = num_tokens - stream.num_tokens
        if num_steps < _MIN_STEPS or elapsed_s <= 0.0 or not is_sample(serial, self.num_observed):
            return
        batch = (self._batch_s - stream.batch_s) / elapsed_s
        context = (self._context_s - stream.context_s) / elapsed_s
        self._fit.observe((1.0, max(1.0, batch), context), elapsed_s / num_steps)

    def _advance(self, now_s: float) -> None:
        elapsed_s = max(0.0, now_s - self._now_s)
        self._now_s = now_s
        self._next_step_s = None
        self._batch_s += elapsed_s * len(self._streams) / self.num_nodes
        self._context_s += elapsed_s * self._num_context_tokens / self.num_nodes
