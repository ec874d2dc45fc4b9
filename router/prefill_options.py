"""What it would take to prefill one prompt on each node of a fleet, with the help of what caches hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.ids import NodeId
from kvrelay.router.block_index import BlockKeys, PrefixMatch
from kvrelay.router.decode_fleet import DecodeFleet
from kvrelay.router.learned_costs import Ints
from kvrelay.router.online_fit import Floats
from kvrelay.router.prefill_fleet import HeldBlocks, PrefillFleet


@dataclass(frozen=True, slots=True, eq=False)
class PrefillOptions:
    """By slot: seconds to compute the prompt with the node's own cache or with what the best holder has,
    whichever is less (`work_s`), of which `pull_s` to fetch that. `own_tokens` are cached there already,
    `pulled_tokens` would be with the pull; `holder` is the node to pull from, of either role. Infinite where
    a node can't take a prompt so long."""

    keys: BlockKeys
    match: PrefixMatch
    own_blocks: Ints
    own_tokens: Ints
    pulled_tokens: Ints
    pull_s: Floats
    work_s: Floats
    does_pull: NDArray[np.bool_]
    holder: NodeId | None
    least_work_s: float

    def num_new_blocks(self, slot: int) -> int:
        """What that node's cache would have to take in."""
        return len(self.keys) - int(self.own_blocks[slot])

    def cached_tokens(self, slot: int) -> int:
        """What need not be computed on that node."""
        return int(self.pulled_tokens[slot] if self.does_pull[slot] else self.own_tokens[slot])


def prefill_options(
    keys: BlockKeys, num_tokens: int, fleet: PrefillFleet, decode: DecodeFleet, now_s: float
) -> PrefillOptions:
    """The options for a prompt of `num_tokens` tokens with these blocks, at this moment. What a decode node
    has, generated blocks among it, counts where it is more than any prefill node has.

    At least one token is computed wherever it runs: its output is wanted.
    """
    held = fleet.held_blocks(keys)
    most = _most_cached(len(keys), num_tokens, fleet.block_size)
    own_tokens = np.minimum(held.later * fleet.block_size, most)
    holder, num_blocks = _best_holder(held, fleet, decode)
    best = min(num_blocks * fleet.block_size, most)
    own_s = fleet.costs.seconds(num_tokens, own_tokens)
    own_s[num_tokens >= fleet.max_tokens] = np.inf
    if best == 0 or best <= own_tokens[own_tokens.argmin()]:
        no_pull = np.zeros(len(own_tokens))
        return PrefillOptions(
            keys, held.match, held.later, own_tokens, own_tokens, no_pull, own_s,
            np.zeros(len(own_tokens), np.bool_), holder, float(own_s[own_s.argmin()]),
        )  # fmt: skip
    pulled_tokens = np.maximum(own_tokens, best)
    pull_s = fleet.pull_costs.seconds(pulled_tokens - own_tokens)
    pulled_s = pull_s + fleet.costs.seconds(num_tokens, pulled_tokens)
    does_pull = (pulled_s < own_s) & fleet.can_pull & (own_s < np.inf)
    if holder is not None and (pausing := fleet.failed_pulls.pausing(holder, now_s)):
        does_pull[[fleet.slots.slot_of[puller] for puller in pausing]] = False
    work_s = np.where(does_pull, pulled_s, own_s)
    return PrefillOptions(
        keys, held.match, held.later, own_tokens, pulled_tokens, pull_s * does_pull, work_s,
        does_pull, holder, float(work_s[work_s.argmin()]),
    )  # fmt: skip


def _best_holder(held: HeldBlocks, fleet: PrefillFleet, decode: DecodeFleet) -> tuple[NodeId | None, int]:
    """The node to pull from, and how many leading blocks it has."""
    slot = int(held.now.argmax())
    num_blocks = int(held.now[slot])
    of_decode, num_decode_blocks = decode.best_holder(held.pullable)
    if num_decode_blocks > num_blocks:
        return of_decode, num_decode_blocks
    return fleet.slots.node_ids[slot], num_blocks


def _most_cached(num_keys: int, num_tokens: int, block_size: int) -> int:
    """Tokens that a cache can spare a node: whole blocks, and never the last token. Where the last block is
    known though it is not full, as in traces, all but that token."""
    if num_keys * block_size > num_tokens:
        return num_tokens - 1
    return (num_tokens - 1) // block_size * block_size
