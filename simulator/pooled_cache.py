"""The hit rate that one cache of all nodes' size would have: placement can't beat it by choosing nodes.

Requests use it in order of arrival, at once. A policy that changes the order of requests can exceed it a
little where caches are small.
"""

from __future__ import annotations

from kvrelay.simulator.block_cache import BlockCache
from kvrelay.simulator.trace import Trace


def pooled_hit_rate(trace: Trace, num_blocks: int) -> float:
    """The share of all prompt tokens that an LRU of `num_blocks` blocks, used by all, would have held."""
    cache = BlockCache(num_blocks)
    num_hit = 0
    for index, num_tokens in enumerate(trace.num_prompt_tokens.tolist()):
        blocks = trace.blocks_of(index)
        num_hit += min(cache.num_held(blocks) * trace.block_tokens, num_tokens - 1)
        cache.insert(blocks)
    return num_hit / int(trace.num_prompt_tokens.sum())
