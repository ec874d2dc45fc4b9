"""Merging the tokens of a request's attempts into one stream: each output index once, in order.

Two nodes speak for one attempt on two connections: the prefill node says the first token, the decode node
all others. So a decode node's tokens may come early; they wait, bounded, for the first token. Whatever has
an index that was delivered already is dropped, and so is everything from an attempt that has ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

from kvrelay.core.ids import AttemptId
from kvrelay.core.node_messages import Role, TokenBatch
from kvrelay.router.events import DeliverTokens, SessionId
from kvrelay.router.output_merge import MAX_TOKEN_ID, OutputMerge
from kvrelay.router.steady_run import SteadyRun


class MergedAttempt(Protocol):
    """What merging needs to know of an attempt."""

    @property
    def attempt_id(self) -> AttemptId: ...

    @property
    def merge(self) -> OutputMerge: ...


@dataclass(slots=True)
class MergedBatch:
    """What became of one `TokenBatch`. `faults` pairs an attempt with what its node did wrong. `steady_run`
    is to be offered the node's next batch."""

    deliveries: dict[SessionId, DeliverTokens] = field(default_factory=dict)
    faults: list[tuple[AttemptId, str]] = field(default_factory=list)
    num_delivered_tokens: int = 0
    num_dropped_tokens: int = 0
    steady_run: SteadyRun | None = None


def batch_fault(batch: TokenBatch) -> str:
    """What makes a batch unusable as a whole, or an empty string: columns of unequal length, bad ids."""
    num_entries, num_tokens = len(batch.attempts), len(batch.token_ids)
    if len(batch.first_indices) != num_entries or len(batch.counts) != num_entries:
        return "its columns differ in length"
    if num_entries == 0:
        return "it has tokens of no attempt" if num_tokens else ""
    if min(batch.counts) < 1 or sum(batch.counts) != num_tokens:
        return "its counts do not add up to its tokens"
    if len(batch.logprobs) not in (0, num_tokens):
        return "its logprobs do not match its tokens"
    if min(batch.token_ids) < 0 or max(batch.token_ids) > MAX_TOKEN_ID or min(batch.first_indices) < 0:
        return "a token id or an index is out of range"
    return ""


def merge_batch(
    batch: TokenBatch, in_flight: Mapping[AttemptId, MergedAttempt], role: Role, now_s: float
) -> MergedBatch:
    """Merge a batch without `batch_fault` that came from a node which has `in_flight` attempts.

    Tokens of other attempts are dropped. Mutates the attempts' merges.
    """
    merged = MergedBatch()
    is_one_each = len(batch.token_ids) == len(batch.attempts)
    if is_one_each and not batch.logprobs and role is Role.DECODE:
        slow: Sequence[int] = _merge_flowing(batch, in_flight, merged)
    else:
        slow = range(len(batch.attempts))
    if slow:
        _merge_each(batch, slow, in_flight, merged, now_s)
    elif batch.step > 0 and 0 < len(batch.token_ids) == merged.num_delivered_tokens:
        merged.steady_run = _start_steady_run(batch, in_flight)
    merged.num_dropped_tokens = len(batch.token_ids) - merged.num_delivered_tokens
    return merged


def _merge_flowing(
    batch: TokenBatch, in_flight: Mapping[AttemptId, MergedAttempt], merged: MergedBatch
) -> list[int]:
    """The hot path: one token each, straight through, without an object per token.

    Returns the entries that need a closer look.
    """
    slow: list[int] = []
    get = in_flight.get
    session: SessionId | None = None
    for entry, (attempt_id, index, token_id) in enumerate(
        zip(_attempt_ids(batch), batch.first_indices, batch.token_ids, strict=True)
    ):
        attempt = get(attempt_id)
        if attempt is None:
            continue
        merge = attempt.merge
        written = merge.written
        if (
            merge.flowing != attempt_id
            or merge.first_index + len(written) != index
            or index >= merge.max_tokens
            or merge.steady_run is not None
        ):
            slow.append(entry)
            continue
        written.append(token_id)
        if merge.session != session:
            session = merge.session
            out = _delivery(merged, session)
            add_stream, add_token = out.stream_ids.append, out.token_ids.append
        add_stream(merge.stream_id)
        add_token(token_id)
    for out in merged.deliveries.values():
        out.counts = [1] * len(out.token_ids)
        merged.num_delivered_tokens += len(out.token_ids)
    return slow


def _start_steady_run(batch: TokenBatch, in_flight: Mapping[AttemptId, MergedAttempt]) -> SteadyRun | None:
    """Of a batch whose rows came again, and all of which went straight through."""
    merges = [in_flight[attempt_id].merge for attempt_id in _attempt_ids(batch)]
    if len({id(merge) for merge in merges}) < len(merges):
        return None  # twice the same: one step further it says what was said before
    return SteadyRun(batch, merges)


def _merge_each(
    batch: TokenBatch,
    entries: Sequence[int],
    in_flight: Mapping[AttemptId, MergedAttempt],
    merged: MergedBatch,
    now_s: float,
) -> None:
    starts = [0]
    for count in batch.counts:
        starts.append(starts[-1] + count)
    for entry in entries:
        attempt = in_flight.get(_attempt_ids(batch)[entry])
        if attempt is None or attempt.merge.attempt != attempt.attempt_id:
            continue
        merge = attempt.merge
        span = slice(starts[entry], starts[entry + 1])
        before = merge.next_index
        fault = merge.offer(
            batch.first_indices[entry],
            batch.token_ids[span],
            batch.logprobs[span],
            _delivery(merged, merge.session),
            now_s,
        )
        merged.num_delivered_tokens += merge.next_index - before
        if fault:
            merged.faults.append((attempt.attempt_id, fault))


def _attempt_ids(batch: TokenBatch) -> Sequence[AttemptId]:
    return cast("Sequence[AttemptId]", batch.attempts)


def _delivery(merged: MergedBatch, session: SessionId) -> DeliverTokens:
    out = merged.deliveries.get(session)
    if out is None:
        out = merged.deliveries[session] = DeliverTokens(session)
    return out
