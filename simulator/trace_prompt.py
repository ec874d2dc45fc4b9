"""Prompts of which only the length and the blocks are known, for a core that takes token ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.ids import NodeId
from kvrelay.router.block_index import BlockIndex, BlockKeys, PrefixMatch
from kvrelay.router.placement import NodeView, PlacementRequest


class TracePrompt(tuple[int, ...]):
    """Has a length, and names its blocks. Its tokens are all 0, and iteration shows one of them: the router
    looks at tokens only to check that they are in the vocabulary."""

    number: int
    """Of its request in the trace."""
    num_tokens: int
    block_keys: Sequence[int]

    @classmethod
    def of(cls, number: int, num_tokens: int, block_keys: Sequence[int]) -> TracePrompt:
        """A prompt of so many tokens."""
        prompt = cls((0,))
        prompt.number, prompt.num_tokens, prompt.block_keys = number, num_tokens, block_keys
        return prompt

    def __len__(self) -> int:
        return self.num_tokens


class TracePrefixes:
    """A `PrefixSource` whose index is kept by the simulation, exactly and without delay."""

    def __init__(self, max_entries: int, num_prefill_nodes: int, num_decode_nodes: int) -> None:
        self.index = BlockIndex(max_entries, num_prefill_nodes + num_decode_nodes)
        self._slots: dict[NodeId, int] = {}

    def enter(self, node_id: NodeId, slot: int) -> None:
        """Give a node its place in the index."""
        self._slots[node_id] = slot

    def keys(self, request: PlacementRequest, node: NodeView) -> BlockKeys:
        """See `PrefixSource`."""
        prompt = request.token_ids
        assert isinstance(prompt, TracePrompt)
        return prompt.block_keys

    def match_prefix(self, keys: BlockKeys) -> PrefixMatch:
        """See `PrefixSource`."""
        return self.index.match_prefix(keys)

    def pullable(self, match: PrefixMatch) -> NDArray[np.int64]:
        """See `PrefixSource`."""
        return match.device

    def index_slot(self, node: NodeView) -> int:
        """See `PrefixSource`."""
        return self._slots[node.description.node_id]
