"""What decode steps and handoffs take, learned from what is seen of them; nothing here is set by hand.

A step is a constant, plus so much for each sequence, plus so much for each token of context that attention
reads. A handoff, from the prefill's end to the decode node's word that all has arrived, is a constant plus so
much for each token whose KV must be sent: most of it went while the prefill computed. Both are one model for
nodes of one kind, with a factor for each node, and for each pair's link.
"""

from __future__ import annotations

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
_MAX_STEP: Final = 4.0
"""One observation tells of at most so many times what was expected: a stall is no slow node."""
_MAX_FACTOR: Final = 1000.0
_MAX_LINKED_NODES: Final = 4096
"""Prefill nodes whose links are remembered."""


class Factors:
    """By slot, how much longer things take than the model says: a mean that forgets, drawn towards 1."""

    def __init__(self) -> None:
        self.values: Floats = np.ones(0)
        self._ratios: Floats = np.zeros(0)
        self._weights: Floats = np.zeros(0)

    def resize(self, num_slots: int) -> None:
        """Keep what is known of the slots so far."""
        more = num_slots - len(self.values)
        self.values = np.concatenate([self.values, np.ones(more)])
        self._ratios = np.concatenate([self._ratios, np.zeros(more)])
        self._weights = np.concatenate([self._weights, np.zeros(more)])

    def forget(self, slot: int) -> None:
        """Something else takes this slot."""
        if slot < len(self.values):
            self.values[slot], self._ratios[slot], self._weights[slot] = 1.0, 0.0, 0.0

    def observe(self, slot: int, ratio: float) -> None:
        """It took so many times what the model says."""
        usual = float(self.values[slot])
        cut = min(max(ratio, usual / _MAX_STEP), usual * _MAX_STEP)
        self._ratios[slot] = self._ratios[slot] * _MEMORY + cut
        self._weights[slot] = self._weights[slot] * _MEMORY + 1.0
        mean = (self._ratios[slot] + _FACTOR_PRIOR) / (self._weights[slot] + _FACTOR_PRIOR)
        self.values[slot] = min(max(mean, 1.0 / _MAX_FACTOR), _MAX_FACTOR)


class StepCosts:
    """Seconds of a decode step by node slot; `factors` has to have a place for each."""

    def __init__(self) -> None:
        self._fit = OnlineFit(_STEP_PRIOR, 1e-6)
        self.factors = Factors()

    def seconds(self, num_seqs: Ints, num_tokens: Ints) -> Floats:
        """Seconds of a step of so many sequences that hold so many tokens, on each node."""
        base_s, seq_s, token_s = self._fit.coefficients.tolist()
        seconds: Floats = (base_s + seq_s * num_seqs + token_s * num_tokens) * self.factors.values
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

    def seconds(self, prefill_node: NodeId, num_tokens: Ints) -> Floats:
        """Seconds from that node to each decode slot, when so many tokens' KV are to be sent."""
        base_s, token_s = self._fit.coefficients.tolist()
        typical: Floats = base_s + token_s * num_tokens
        link = self._links.get(prefill_node)
        if link is None:
            return typical
        link.resize(max(len(typical), len(link.values)))
        return typical * link.values[: len(typical)]

    def observe(self, prefill_node: NodeId, slot: int, num_tokens: int, measured_s: float) -> None:
        """A handoff of so many tokens took so long."""
        features = (1.0, float(num_tokens))
        link = self._links.setdefault(prefill_node, Factors())
        self._links.move_to_end(prefill_node)
        if len(self._links) > _MAX_LINKED_NODES:
            self._links.popitem(last=False)
        link.resize(max(slot + 1, len(link.values)))
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
