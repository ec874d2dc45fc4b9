"""What decode steps and handoffs take, learned from what is seen of them; nothing here is set by hand.

A step is a constant, plus so much for each sequence, plus so much for each token of context that attention
reads. A handoff, from the prefill's end to the decode node's word that all has arrived, is a constant plus so
much for each token whose KV must be sent: most of it went while the prefill computed. Both are one model for
nodes of one kind, with a factor for each node, and for each pair's link.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.ids import NodeId
from kvrelay.router.online_fit import Floats, OnlineFit

Ints = NDArray[np.int64]

_STEP_PRIOR: Final = (0.0065, 2e-5, 4e-8)
"""Seconds: of a step, of a sequence in it, of a token of context. An 8B model on one H100, roughly."""
_HANDOFF_PRIOR: Final = (0.003, 3e-7)
"""Seconds: of a handoff, of a token that is sent. NVLink, roughly."""
_MEMORY: Final = 0.97
_FACTOR_PRIOR: Final = 1.0
"""Observations that the first guess, a factor of 1, weighs as much as."""
_FIRST_VARIANCE: Final = 0.25
"""Of ratios, while few were seen."""
_SAME_WITHIN: Final = 0.1
_SAME_WITHIN_ERRORS: Final = 3.0
"""Things that differ by less than this, or by less than so many standard errors, count as alike: else noise
would take a session away from where its KV is."""
_MAX_STEP: Final = 4.0
"""One observation tells of at most so many times what was expected: a stall is no slow node."""
_MAX_FACTOR: Final = 1000.0
_MAX_LINKED_NODES: Final = 4096
"""Prefill nodes whose links are remembered."""


class Factors:
    """By slot, how much longer things take than the model says: a mean that forgets, drawn towards 1, and 1
    until it is clear that it is another."""

    def __init__(self) -> None:
        self.values: Floats = np.ones(0)
        self._is_new: NDArray[np.bool_] = np.ones(0, np.bool_)
        self._sums: Floats = np.zeros((0, 3))
        """By slot: of weights, of weighted ratios, of weighted squares of ratios."""

    def resize(self, num_slots: int) -> None:
        """Keep what is known of the slots so far."""
        more = num_slots - len(self.values)
        if more <= 0:
            return
        self.values = np.concatenate([self.values, np.ones(more)])
        self._is_new = np.concatenate([self._is_new, np.ones(more, np.bool_)])
        self._sums = np.concatenate([self._sums, np.zeros((more, 3))])

    def forget(self, slot: int) -> None:
        """Something else takes this slot."""
        if slot < len(self.values):
            self.values[slot], self._sums[slot], self._is_new[slot] = 1.0, 0.0, True

    def note_first(self, slot: int) -> bool:
        """Whether it is asked for the first time about what is in this slot."""
        is_first = bool(self._is_new[slot])
        self._is_new[slot] = False
        return is_first

    def observe(self, slot: int, ratio: float) -> None:
        """It took so many times what the model says."""
        usual = float(self.values[slot])
        cut = min(max(ratio, usual / _MAX_STEP), usual * _MAX_STEP)
        sums = self._sums[slot]
        sums *= _MEMORY
        sums += (1.0, cut, cut * cut)
        weight, total, squares = sums.tolist()
        mean = (total + _FACTOR_PRIOR) / (weight + _FACTOR_PRIOR)
        variance = max(0.0, squares / weight - (total / weight) ** 2)
        error = math.sqrt((variance + _FIRST_VARIANCE / weight) / weight)
        is_alike = abs(mean - 1.0) <= max(_SAME_WITHIN, _SAME_WITHIN_ERRORS * error)
        self.values[slot] = 1.0 if is_alike else min(max(mean, 1.0 / _MAX_FACTOR), _MAX_FACTOR)


class StepCosts:
    """Seconds of a decode step by node slot; `factors` has to have a place for each."""

    def __init__(self) -> None:
        self._fit = OnlineFit(_STEP_PRIOR, 1e-6)
        self.factors = Factors()

    def seconds(self, num_seqs: Ints, num_tokens: Ints) -> Floats:
        """Seconds of a step of so many sequences that hold so many tokens, on each node."""
        base_s, seq_s, token_s = self._fit.coefficients
        seconds: Floats = np.multiply(seq_s, num_seqs, dtype=np.float64)
        seconds += base_s
        seconds += token_s * num_tokens
        seconds *= self.factors.values
        return seconds

    def observe(self, slot: int, num_seqs: int, num_tokens: int, measured_s: float) -> None:
        """A step of that node took so long."""
        features = (1.0, float(num_seqs), float(num_tokens))
        factor = float(self.factors.values[slot])
        self.factors.observe(slot, measured_s / self._fit.expected(features))
        self._fit.observe(features, measured_s / factor)


class HandoffCosts:
    """Seconds of a handoff by pair: prefill nodes by name, decode nodes by slot."""

    def __init__(self) -> None:
        self._fit = OnlineFit(_HANDOFF_PRIOR, 1e-6)
        self._links: OrderedDict[NodeId, Factors] = OrderedDict()
        self.num_slots = 0
        """Of decode nodes."""

    def seconds(self, prefill_node: NodeId, num_tokens: Ints) -> Floats:
        """Seconds from that node to each decode slot, when so many tokens' KV are to be sent."""
        base_s, token_s = self._fit.coefficients
        typical: Floats = np.multiply(token_s, num_tokens, dtype=np.float64)
        typical += base_s
        link = self._links.get(prefill_node)
        if link is None:
            return typical
        link.resize(len(typical))
        return typical * link.values[: len(typical)]

    def observe(self, prefill_node: NodeId, slot: int, num_tokens: int, measured_s: float) -> None:
        """A handoff of so many tokens took so long. A pair's first one is not learned from: it took the time
        to connect, too."""
        features = (1.0, float(num_tokens))
        link = self._links.setdefault(prefill_node, Factors())
        self._links.move_to_end(prefill_node)
        if len(self._links) > _MAX_LINKED_NODES:
            self._links.popitem(last=False)
        link.resize(max(slot + 1, self.num_slots))
        if link.note_first(slot):
            return
        factor = float(link.values[slot])
        link.observe(slot, measured_s / self._fit.expected(features))
        self._fit.observe(features, measured_s / factor)

    def forget(self, slot: int) -> None:
        """Another decode node takes this slot."""
        for link in self._links.values():
            link.forget(slot)

    def forget_prefill(self, node_id: NodeId) -> None:
        """The prefill node is gone."""
        self._links.pop(node_id, None)
