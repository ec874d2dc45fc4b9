"""Merging the tokens of a request's attempts into one stream: each output index once, in order.

Two nodes speak for one attempt on two connections: the prefill node says the first token, the decode node
all others. So a decode node's tokens may come early; they wait, bounded, for the first token. Whatever has
an index that was delivered already is dropped, and so is everything from an attempt that has ended.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, cast

from kvrelay.core.ids import AttemptId
from kvrelay.core.node_messages import Role, TokenBatch
from kvrelay.core.request import TokenLogprobs
from kvrelay.router.events import DeliverTokens, SessionId

NO_ATTEMPT: Final = AttemptId(0)
_MAX_TOKEN_ID: Final = 2**31 - 1

_Logprobs = Sequence[TokenLogprobs | None]


@dataclass(slots=True, eq=False)
class OutputMerge:
    """One request's output so far, and what it waits for.

    `tokens` are those delivered by this router; `next_index` is the output index that comes next.
    `attempt` is the one whose tokens count; `flowing` equals it as soon as its first token is in, which is
    when its decode node's tokens go straight through.
    """

    session: SessionId
    stream_id: int
    first_index: int
    max_tokens: int
    max_early_tokens: int
    next_index: int = field(init=False)
    tokens: array[int] = field(default_factory=lambda: array("i"))
    attempt: AttemptId = NO_ATTEMPT
    flowing: AttemptId = NO_ATTEMPT
    first_token_s: float | None = None
    early_tokens: list[int] = field(default_factory=list)
    early_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.next_index = self.first_index

    def start_attempt(self, attempt: AttemptId) -> None:
        """From now on only this attempt's tokens count (`NO_ATTEMPT`: nobody's)."""
        self.attempt = attempt
        self.flowing = NO_ATTEMPT
        self.early_tokens.clear()
        self.early_logprobs.clear()

    def offer(
        self,
        first_index: int,
        token_ids: Sequence[int],
        logprobs: _Logprobs,
        out: DeliverTokens,
        now_s: float,
    ) -> str:
        """Take tokens of the current attempt; what can be delivered is appended to `out`.

        Mutates this merge and `out`. Returns what is wrong with them, or an empty string.
        """
        num_known = self.next_index - first_index
        if num_known >= len(token_ids):
            return ""
        if num_known < 0:
            return self._keep_early(first_index, token_ids, logprobs)
        if self.first_token_s is None:
            self.first_token_s = now_s
        fault = self._deliver(token_ids[num_known:], logprobs[num_known:], out)
        self.flowing = self.attempt
        if not fault and self.early_tokens:
            early_tokens, early_logprobs = self.early_tokens, self.early_logprobs
            self.early_tokens, self.early_logprobs = [], []
            # The early ones follow the attempt's first token, whichever node it came from.
            skip = max(0, len(token_ids) - num_known - 1)
            fault = self._deliver(early_tokens[skip:], early_logprobs[skip:], out)
        return fault

    def _deliver(self, token_ids: Sequence[int], logprobs: _Logprobs, out: DeliverTokens) -> str:
        room = self.max_tokens - self.next_index
        accepted = token_ids[:room]
        if accepted:
            self.tokens.extend(accepted)
            self.next_index += len(accepted)
            _append(out, self.stream_id, accepted, logprobs[:room])
        if len(token_ids) > room:
            return f"it went on after max_tokens ({self.max_tokens})"
        return ""

    def _keep_early(self, first_index: int, token_ids: Sequence[int], logprobs: _Logprobs) -> str:
        if self.flowing == self.attempt:
            return f"it skipped from output token {self.next_index} to {first_index}"
        expected = self.next_index + 1 + len(self.early_tokens)
        if first_index > expected:
            return f"it skipped from output token {expected} to {first_index}"
        fresh = token_ids[expected - first_index :]
        if len(self.early_tokens) + len(fresh) > self.max_early_tokens:
            return f"it is more than {self.max_early_tokens} tokens ahead of the prefill node's first"
        self.early_tokens.extend(fresh)
        self.early_logprobs.extend(logprobs[expected - first_index :] or [None] * len(fresh))
        return ""


class MergedAttempt(Protocol):
    """What merging needs to know of an attempt."""

    @property
    def attempt_id(self) -> AttemptId: ...

    @property
    def merge(self) -> OutputMerge: ...


@dataclass(slots=True)
class MergedBatch:
    """What became of one `TokenBatch`. `faults` pairs an attempt with what its node did wrong."""

    deliveries: dict[SessionId, DeliverTokens] = field(default_factory=dict)
    faults: list[tuple[AttemptId, str]] = field(default_factory=list)
    num_delivered_tokens: int = 0
    num_dropped_tokens: int = 0


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
    if min(batch.token_ids) < 0 or max(batch.token_ids) > _MAX_TOKEN_ID or min(batch.first_indices) < 0:
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
        if merge.flowing != attempt_id or merge.next_index != index or index >= merge.max_tokens:
            slow.append(entry)
            continue
        merge.next_index = index + 1
        merge.tokens.append(token_id)
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


def _append(out: DeliverTokens, stream_id: int, token_ids: Sequence[int], logprobs: _Logprobs) -> None:
    if logprobs or out.logprobs:
        # One column for all: those without get None.
        out.logprobs.extend([None] * (len(out.token_ids) - len(out.logprobs)))
        out.logprobs.extend(logprobs or [None] * len(token_ids))
    out.stream_ids.append(stream_id)
    out.counts.append(len(token_ids))
    out.token_ids.extend(token_ids)
