"""A decision's candidates, kept as columns until somebody asks: placing among a thousand nodes makes no
object for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, overload

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.explanation import Candidate
from kvrelay.core.ids import NodeId
from kvrelay.core.node_messages import Role
from kvrelay.router.fleet_slots import FleetSlots
from kvrelay.router.placement import PlacementRequest

TOO_LONG: Final = "the sequence is too long for it"
FAILED_BEFORE: Final = "it failed this request before"

Column = NDArray[np.float64] | NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class CandidateColumns:
    """The nodes of one role as a decision saw them, by slot (None: no node there).

    A candidate's score is the sum of `terms`; `remarks` are shown beside them and not part of the score.
    What speaks against nodes: `objections` by slot, and, for whole groups of slots, `exclusions`.
    """

    role: Role
    node_ids: Sequence[NodeId | None]
    terms: tuple[tuple[str, Column], ...]
    remarks: tuple[tuple[str, Column], ...] = ()
    exclusions: tuple[tuple[str, NDArray[np.bool_]], ...] = ()
    objections: dict[int, str] = field(default_factory=dict)

    def candidates(self) -> list[Candidate]:
        """One for each node; a node whose score is not finite had something against it."""
        made = []
        for slot, node_id in enumerate(self.node_ids):
            if node_id is None:
                continue
            values = [(name, float(column[slot])) for name, column in self.terms]
            score = sum(value for _, value in values)
            objection = self._objection(slot)
            if not np.isfinite(score):
                values = [(name, value if np.isfinite(value) else 0.0) for name, value in values]
                score, objection = sum(value for _, value in values), objection or "it can't take it now"
            shown = (*values, *((name, float(column[slot])) for name, column in self.remarks))
            made.append(Candidate(node_id, self.role, score, shown, objection))
        return made

    def _objection(self, slot: int) -> str:
        excluded = (why for why, is_excluded in self.exclusions if is_excluded[slot])
        return self.objections.get(slot, "") or next(excluded, "")


def exclude_failed(
    request: PlacementRequest, slots: FleetSlots, score: NDArray[np.float64], objections: dict[int, str]
) -> None:
    """Nodes that failed the request before are out of the question, unless no other one could take it."""
    failed = [slots.slot_of[node_id] for node_id in request.avoided if node_id in slots.slot_of]
    if failed and np.isfinite(score[failed]).sum() < np.isfinite(score).sum():
        score[failed] = np.inf
        objections.update(dict.fromkeys(failed, FAILED_BEFORE))


class LazyCandidates(Sequence[Candidate]):
    """The candidates of several columns one after another. Even the columns are made at the first look."""

    __slots__ = ("_columns", "_made")

    def __init__(self, *columns: Callable[[], CandidateColumns]) -> None:
        self._columns = columns
        self._made: tuple[Candidate, ...] | None = None

    def __len__(self) -> int:
        return len(self._all())

    @overload
    def __getitem__(self, index: int) -> Candidate: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Candidate]: ...

    def __getitem__(self, index: int | slice) -> Candidate | Sequence[Candidate]:
        return self._all()[index]

    def _all(self) -> tuple[Candidate, ...]:
        if self._made is None:
            self._made = tuple(made for columns in self._columns for made in columns().candidates())
            self._columns = ()
        return self._made
