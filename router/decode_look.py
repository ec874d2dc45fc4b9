"""The decode nodes of one fleet as they look for one sequence, and which of them is best for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.ids import NodeId
from kvrelay.core.node_messages import Role
from kvrelay.router.decode_costs import Ints
from kvrelay.router.lazy_candidates import TOO_LONG, CandidateColumns
from kvrelay.router.online_fit import Floats


@dataclass(frozen=True, slots=True, eq=False)
class DecodeLook:
    """By slot, ``[num_slots]``. `blocks` and `seqs` are what the node would have with this sequence, of
    `max_blocks` and `max_seqs`; `held_tokens` of the prompt need not be sent to it. `handoff_s`, `decode_s`
    and `others_s` are the terms of the score, seconds; a step takes `step_s` with this sequence, of which
    `adds_s` is because of it."""

    node_ids: Sequence[NodeId | None]
    is_open: NDArray[np.bool_]
    is_too_long: NDArray[np.bool_]
    has_no_room: NDArray[np.bool_]
    blocks: Ints
    seqs: Ints
    max_blocks: Ints
    max_seqs: Ints
    held_tokens: Ints
    growth: int
    handoff_s: Floats
    step_s: Floats
    adds_s: Floats
    decode_s: Floats
    others_s: Floats

    def score(self, is_able: NDArray[np.bool_]) -> Floats:
        """The sum of the terms; infinite for nodes that are not able."""
        score: Floats = np.where(is_able, self.handoff_s + self.decode_s + self.others_s, np.inf)
        return score

    def best(self, score: Floats, rng: Random) -> int | None:
        """Of the least scores, within what one sequence makes out, the one with most held, then the least
        full, then one at random; None: there is no finite one."""
        least = int(score.argmin())
        if score[least] == np.inf:
            return None
        (near,) = (score <= score[least] + 2 * self.growth * self.adds_s[least]).nonzero()
        held = self.held_tokens[near]
        near = near[held == held[held.argmax()]]
        fullness = self.fullness(near)
        near = near[fullness <= fullness[fullness.argmin()] + 1e-12]
        return int(near[rng.randrange(len(near))]) if len(near) > 1 else int(near[0])

    def fullness(self, slots: NDArray[np.int64] | slice) -> Floats:
        """Of those nodes, the share that is taken of what each has less of, blocks or sequences."""
        of_blocks, of_seqs = (
            self.blocks[slots] / self.max_blocks[slots],
            self.seqs[slots] / self.max_seqs[slots],
        )
        fullness: Floats = np.maximum(of_blocks, of_seqs)
        return fullness

    def columns(self, objections: dict[int, str]) -> CandidateColumns:
        """What is shown of it, with the objections of nodes that were asked."""
        return CandidateColumns(
            Role.DECODE,
            self.node_ids,
            (("handoff_s", self.handoff_s), ("decode_s", self.decode_s), ("others_s", self.others_s)),
            (
                ("itl_s", self.step_s),
                ("held_tokens", self.held_tokens),
                ("fullness", self.fullness(slice(None))),
            ),
            (
                ("it drains", ~self.is_open),
                (TOO_LONG, self.is_too_long),
                ("it has no room", self.has_no_room),
            ),
            objections,
        )
