"""What is remembered of the latest placements, so that each can be asked about afterwards.

Bounded. While a request lives, what was measured stands in its ledger entry and is read only when somebody
asks; at its end it is copied here once. Nothing is done per token.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from kvrelay.core.errors import UnknownRequest
from kvrelay.core.explanation import Decision, Explanation, MeasuredRequest
from kvrelay.core.ids import RequestId
from kvrelay.router.ledger import ENDED, RequestEntry


@dataclass(slots=True, eq=False)
class _Record:
    """`serial` tells requests apart that used one id in turn. `measured` is None while the request lives."""

    serial: int
    model: str
    decision: Decision
    placed_s: float
    measured: MeasuredRequest | None = None


class PlacementMemory:
    """The latest placement of each of the `max_requests` requests that were placed last."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._records: OrderedDict[RequestId, _Record] = OrderedDict()

    def record_placement(self, entry: RequestEntry, decision: Decision, now_s: float) -> None:
        """An attempt of the request was dispatched; what an earlier one left is forgotten."""
        self._records[entry.request_id] = _Record(entry.serial, entry.model, decision, now_s)
        self._records.move_to_end(entry.request_id)
        while len(self._records) > self._max_requests:
            self._records.popitem(last=False)

    def record_end(self, entry: RequestEntry, now_s: float) -> None:
        """The request has ended: keep what was measured, as its entry goes."""
        record = self._records.get(entry.request_id)
        if record is not None and record.serial == entry.serial:
            record.measured = _measure(entry, record.placed_s, now_s)

    def explain(self, request_id: RequestId, live: RequestEntry | None, now_s: float) -> Explanation:
        """The latest placement of a request; `live` is the ledger's entry of that id, if there is one.

        Raises:
            UnknownRequest: no placement of it is remembered, or it has not been placed yet.
        """
        if live is not None and live.first_dispatch_s is None:
            raise UnknownRequest(
                f"request_id {request_id!r} is queued and has not been placed yet", field="request_id"
            )
        record = self._records.get(request_id)
        if record is None:
            raise self._unknown(request_id)
        measured = record.measured
        if measured is None:
            assert live is not None, "a request ended without a word to this memory"
            assert live.serial == record.serial
            measured = _measure(live, record.placed_s, now_s)
        return Explanation(request_id, record.model, now_s - record.placed_s, record.decision, measured)

    def _unknown(self, request_id: RequestId) -> UnknownRequest:
        limit, number = self._max_requests, len(self._records)
        return UnknownRequest(
            f"request_id {request_id!r} is not remembered: this router keeps the placements of the latest"
            f" {limit} requests (num_remembered_decisions), and has {number}",
            field="request_id",
        )


def _measure(entry: RequestEntry, placed_s: float, now_s: float) -> MeasuredRequest:
    assert entry.first_dispatch_s is not None
    merge, prefilled, handoff, error = entry.merge, entry.prefilled, entry.handoff, entry.last_error
    return MeasuredRequest(
        state=entry.state.value,
        num_attempts=entry.num_attempts,
        num_prompt_tokens=entry.request.num_prompt_tokens,
        num_output_tokens=merge.next_index,
        queue_s=entry.first_dispatch_s - entry.submitted_s,
        ttft_s=_between(entry.submitted_s, merge.first_token_s),
        total_s=now_s - entry.submitted_s if entry.state in ENDED else None,
        finish_reason=entry.finish_reason,
        error_code=error.code if error else "",
        error_message=error.message if error else "",
        placed_ttft_s=_between(placed_s, merge.attempt_first_token_s),
        num_cached_tokens=prefilled.num_cached_tokens if prefilled else None,
        num_pulled_tokens=prefilled.num_pulled_tokens if prefilled else 0,
        pull_s=prefilled.pull_s if prefilled else 0.0,
        pull_error=prefilled.pull_error if prefilled else "",
        prefill_queue_s=prefilled.queue_s if prefilled else None,
        prefill_compute_s=prefilled.compute_s if prefilled else None,
        kv_bytes=handoff.num_bytes if handoff else 0,
        kv_seconds=handoff.seconds if handoff else 0.0,
        kv_transport=handoff.transport if handoff else "",
        handoff_s=_handoff_s(entry),
        num_held_tokens=entry.num_held_tokens,
    )


def _handoff_s(entry: RequestEntry) -> float | None:
    """0: the decode node's word came first."""
    if entry.prefilled_s is None or entry.handed_over_s is None:
        return None
    return max(0.0, entry.handed_over_s - entry.prefilled_s)


def _between(start_s: float, end_s: float | None) -> float | None:
    return None if end_s is None else end_s - start_s
