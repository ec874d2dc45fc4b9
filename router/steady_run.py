"""Steady decode: a node's rows are those of its step before, one token further each.

Once such a batch has gone through, every check of the merges has been made: of the next ones only the token
ids are new. They are delivered as they are, and written to the requests' outputs many steps at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

from kvrelay.core.node_messages import TokenBatch
from kvrelay.router.events import DeliverTokens, SessionId
from kvrelay.router.output_merge import MAX_TOKEN_ID, OutputMerge

MAX_UNWRITTEN_STEPS: Final = 64
"""After so many steps the outputs are written, though nobody asked for them."""


class SteadyRun:
    """The rows of one decode node's last batch, each of which flowed: one token of another request.

    `batch` is that last batch. A run ends for good as soon as one of its outputs is touched by anything
    else, or the node gives an attempt back; it can't go stale, because the outputs themselves end it.
    """

    def __init__(self, batch: TokenBatch, merges: Sequence[OutputMerge]) -> None:
        self._last = batch
        self._merges = merges
        self._num_steps_left = min(merge.max_tokens - merge.next_index for merge in merges)
        self._shares = _shares(merges)
        self._unwritten = array("i")
        self._is_live = True
        for merge in merges:
            assert merge.steady_run is None, "two runs would deliver for one output"
            merge.steady_run = self

    @property
    def is_live(self) -> bool:
        return self._is_live

    @property
    def merges(self) -> Sequence[OutputMerge]:
        """Of each row."""
        return self._merges

    def goes_on_with(self, batch: TokenBatch) -> bool:
        """Whether `deliver` may have this batch: it is the next step, and nothing needs a closer look."""
        return (
            self._is_live
            and self._num_steps_left > 0
            and batch.is_next_step_of(self._last)
            and not batch.logprobs
            and len(batch.token_ids) == len(self._merges)
            and min(batch.token_ids) >= 0
            and max(batch.token_ids) <= MAX_TOKEN_ID
        )

    def deliver(self, batch: TokenBatch) -> list[DeliverTokens]:
        """Take the next step; one delivery per session, whose `stream_ids` and `counts` are always the same
        lists."""
        token_ids = batch.token_ids
        self._unwritten.extend(token_ids)
        self._num_steps_left -= 1
        self._last = batch
        if len(self._unwritten) >= MAX_UNWRITTEN_STEPS * len(self._merges):
            self.settle()
        return [share.deliver(token_ids) for share in self._shares]

    def settle(self) -> None:
        """Write to the outputs what has been delivered of them."""
        unwritten, self._unwritten = self._unwritten, array("i")
        if unwritten:
            num_rows = len(self._merges)
            for row, merge in enumerate(self._merges):
                merge.written.extend(unwritten[row::num_rows])

    def end(self) -> None:
        """Settle and let go of the outputs; the node's next batch is looked at row by row."""
        self._is_live = False
        self.settle()
        for merge in self._merges:
            merge.steady_run = None


class _Share:
    """One session's part of the rows; `rows` is None if it is all of them."""

    __slots__ = ("_counts", "_rows", "_session", "_stream_ids")

    def __init__(self, session: SessionId, stream_ids: list[int], rows: list[int] | None) -> None:
        self._session = session
        self._stream_ids = stream_ids
        self._counts = [1] * len(stream_ids)
        self._rows = rows

    def deliver(self, token_ids: Sequence[int]) -> DeliverTokens:
        own = list(token_ids) if self._rows is None else [token_ids[row] for row in self._rows]
        return DeliverTokens(self._session, self._stream_ids, self._counts, own)


def _shares(merges: Sequence[OutputMerge]) -> list[_Share]:
    rows_of: dict[SessionId, list[int]] = {}
    for row, merge in enumerate(merges):
        rows_of.setdefault(merge.session, []).append(row)
    return [
        _Share(session, [merges[row].stream_id for row in rows], rows if len(rows_of) > 1 else None)
        for session, rows in rows_of.items()
    ]
