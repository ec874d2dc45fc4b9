"""The ledger: which state each request is in, who holds KV for it, and what releases that.

    state         KV held by                               leaves by
    QUEUED        nobody                                   placed, refused, cancelled, deadline
    PREFILLING    P computes, D has reserved               first token, failure of P or D, cancelled
    HANDING_OFF   P holds, D receives                      D has verified, failure of P or D, cancelled
    DECODING      D                                        finished, failure of D, cancelled
    DONE, FAILED  nobody, once both sides have reported    -

A request has at most one current attempt. An attempt has two sides, one per node, and each side ends by
exactly one settlement: the node's terminal report, the node's loss, or the end of an unacknowledged hold.
An attempt stays on the books until both sides are settled; nothing else drops it. An attempt may have a pull,
whose holder's side is on the books by itself (see `kvrelay.router.pulls`).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Final

from kvrelay.core.errors import KVRelayError
from kvrelay.core.ids import AttemptId, NodeId, RequestId
from kvrelay.core.node_messages import HandoffVerified, PrefillFinished, Role
from kvrelay.core.request import FinishReason, TokenRequest
from kvrelay.router.block_keys import PromptBlocks
from kvrelay.router.events import SessionId
from kvrelay.router.output_merge import NO_ATTEMPT, OutputMerge
from kvrelay.router.placement import PlacementRequest


class RequestState(StrEnum):
    """See the module's table."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    HANDING_OFF = "handing_off"
    DECODING = "decoding"
    DONE = "done"
    FAILED = "failed"


_S = RequestState

TRANSITIONS: Final[Mapping[RequestState, frozenset[RequestState]]] = {
    _S.QUEUED: frozenset({_S.PREFILLING, _S.DONE, _S.FAILED}),
    _S.PREFILLING: frozenset({_S.HANDING_OFF, _S.QUEUED, _S.DONE, _S.FAILED}),
    _S.HANDING_OFF: frozenset({_S.DECODING, _S.QUEUED, _S.DONE, _S.FAILED}),
    _S.DECODING: frozenset({_S.QUEUED, _S.DONE, _S.FAILED}),
    _S.DONE: frozenset(),
    _S.FAILED: frozenset(),
}
"""The only moves there are; back to QUEUED means: to be continued by another attempt. QUEUED to DONE: what
was submitted is the continuation of an output that was complete already."""

ENDED: Final = frozenset({_S.DONE, _S.FAILED})


class SideState(Enum):
    """One node's part in one attempt."""

    LIVE = 0
    """Its command is sent and no terminal report has come."""
    RELEASING = 1
    """`ReleaseKV` is sent and not yet answered."""
    SETTLED = 2
    """It holds nothing of the attempt."""


@dataclass(slots=True, eq=False)
class Side:
    """What one attempt takes from one node: tokens yet to compute (prefill), or blocks (decode)."""

    node_id: NodeId
    num_tokens: int = 0
    num_blocks: int = 0
    state: SideState = SideState.LIVE
    is_overdue: bool = False


@dataclass(slots=True, eq=False)
class RequestEntry:
    """One accepted request. `request` is as submitted, with its seed; the output lives in `merge`.

    The nodes, `prefilled`, `handoff`, when they came, and what the decode node held are the latest attempt's.
    `last_error` is why the request failed, or the last attempt that came to nothing.
    """

    serial: int
    request_id: RequestId
    session: SessionId
    stream_id: int
    model: str
    request: TokenRequest
    submitted_s: float
    deadline_s: float
    merge: OutputMerge
    state: RequestState = RequestState.QUEUED
    attempt: Attempt | None = None
    continued: TokenRequest | None = None
    hashed: PromptBlocks | None = None
    placing: PlacementRequest | None = None
    """As the policy saw it last."""
    num_attempts: int = 0
    num_unsettled_attempts: int = 0
    queued_since_s: float = 0.0
    queue_deadline_s: float = 0.0
    not_before_s: float = 0.0
    first_dispatch_s: float | None = None
    last_error: KVRelayError | None = None
    avoided: frozenset[NodeId] = frozenset()
    prefill_node: str = ""
    decode_node: str = ""
    prefilled: PrefillFinished | None = None
    handoff: HandoffVerified | None = None
    prefilled_s: float | None = None
    handed_over_s: float | None = None
    num_held_tokens: int | None = None
    finish_reason: FinishReason | None = None

    def move_to(self, state: RequestState) -> None:
        """Change state along `TRANSITIONS`; any other move is a bug."""
        assert state in TRANSITIONS[self.state], f"{self.request_id}: {self.state} -> {state}"
        self.state = state

    def continuation(self) -> TokenRequest:
        """The request together with all output delivered so far; built once while that does not grow."""
        if not self.merge.tokens:
            return self.request
        if self.continued is None or self.continued.num_output_tokens != self.merge.next_index:
            self.continued = self.request.continued_with(tuple(self.merge.tokens))
        return self.continued

    def blocks(self) -> PromptBlocks:
        """The blocks of `continuation`, hashed once while that does not grow."""
        request = self.continuation()
        if self.hashed is None or self.hashed.token_ids is not request.token_ids:
            self.hashed = PromptBlocks(request.token_ids, request.cache_salt)
        return self.hashed


@dataclass(slots=True, eq=False)
class Attempt:
    """One try of one request on one pair. `merge` is the entry's, so that tokens find it in one step.

    `early_finish` is the decode node's finish reason when it came before the prefill node's first token.
    """

    attempt_id: AttemptId
    entry: RequestEntry
    merge: OutputMerge
    prefill: Side
    decode: Side
    max_sequence_tokens: int
    eos_token_ids: frozenset[int]
    is_verified: bool = False
    early_finish: FinishReason | None = None
    pull: Pull | None = None

    def side(self, role: Role) -> Side:
        return self.prefill if role is Role.PREFILL else self.decode

    @property
    def is_current(self) -> bool:
        """Whether its request still counts on it."""
        return self.entry.attempt is self

    @property
    def has_first_token(self) -> bool:
        return self.merge.flowing == self.attempt_id

    @property
    def is_settled(self) -> bool:
        return self.prefill.state is self.decode.state is SideState.SETTLED


@dataclass(slots=True, eq=False)
class Pull:
    """What an attempt's prefill node takes from the node of `holder`, which sends it as `pull_id`."""

    pull_id: AttemptId
    attempt: Attempt
    holder: Side
    num_tokens: int


@dataclass(slots=True, eq=False)
class Ledger:
    """All live requests, all unsettled attempts, and the requests that ended but are not yet settled."""

    requests: dict[RequestId, RequestEntry] = field(default_factory=dict)
    streams: dict[SessionId, dict[int, RequestEntry]] = field(default_factory=dict)
    attempts: dict[AttemptId, Attempt] = field(default_factory=dict)
    pulls: dict[AttemptId, Pull] = field(default_factory=dict)
    """Unsettled ones."""
    closing: dict[int, RequestEntry] = field(default_factory=dict)
    releasing: OrderedDict[tuple[AttemptId, Role], float] = field(default_factory=OrderedDict)
    """When each unanswered `ReleaseKV` was sent, oldest first."""
    releasing_pulls: OrderedDict[AttemptId, float] = field(default_factory=OrderedDict)
    """The same of pulls."""
    earliest_deadline_s: float = math.inf
    """No live request's deadline is before this; so that a tick need not look at them all."""
    num_requests_ever: int = 0
    num_attempts_ever: int = 0

    def add_request(self, entry: RequestEntry) -> None:
        self.requests[entry.request_id] = entry
        self.streams.setdefault(entry.session, {})[entry.stream_id] = entry
        self.earliest_deadline_s = min(self.earliest_deadline_s, entry.deadline_s)

    def take_overdue(self, now_s: float) -> list[RequestEntry]:
        """The live requests whose deadline has passed; each is to be ended."""
        if now_s < self.earliest_deadline_s:
            return []
        overdue = [entry for entry in self.requests.values() if entry.deadline_s <= now_s]
        later = (entry.deadline_s for entry in self.requests.values() if entry.deadline_s > now_s)
        self.earliest_deadline_s = min(later, default=math.inf)
        return overdue

    def next_serial(self) -> int:
        self.num_requests_ever += 1
        return self.num_requests_ever

    def next_attempt_id(self) -> AttemptId:
        """For an attempt, or a pull."""
        self.num_attempts_ever += 1
        return AttemptId(self.num_attempts_ever)

    def add_attempt(self, attempt: Attempt) -> None:
        """Make it its request's current attempt."""
        entry = attempt.entry
        assert entry.attempt is None
        self.attempts[attempt.attempt_id] = attempt
        entry.attempt = attempt
        entry.num_unsettled_attempts += 1
        entry.merge.start_attempt(attempt.attempt_id)

    def detach_attempt(self, entry: RequestEntry) -> Attempt | None:
        """End the current attempt, if any, for the request; its sides stay on the books until settled."""
        attempt, entry.attempt = entry.attempt, None
        entry.merge.start_attempt(NO_ATTEMPT)
        return attempt

    def close_request(self, entry: RequestEntry) -> None:
        """The request has ended: forget its names, keep it while sides are unsettled."""
        assert entry.state in ENDED
        assert entry.attempt is None
        del self.requests[entry.request_id]
        streams = self.streams[entry.session]
        del streams[entry.stream_id]
        if not streams:
            del self.streams[entry.session]
        if entry.num_unsettled_attempts:
            self.closing[entry.serial] = entry

    def mark_releasing(self, attempt: Attempt, role: Role, now_s: float) -> None:
        side = attempt.side(role)
        assert side.state is SideState.LIVE
        side.state = SideState.RELEASING
        self.releasing[attempt.attempt_id, role] = now_s

    def settle_side(self, attempt: Attempt, role: Role) -> None:
        """That node holds nothing of this attempt any more; an ended attempt goes with its last side."""
        side = attempt.side(role)
        assert side.state is not SideState.SETTLED
        side.state = SideState.SETTLED
        self.releasing.pop((attempt.attempt_id, role), None)
        if not attempt.is_current:
            self.drop_if_settled(attempt)

    def drop_if_settled(self, attempt: Attempt) -> None:
        """Drop an ended attempt whose sides are settled; with its last one, an ended request goes too."""
        assert not attempt.is_current
        if not attempt.is_settled or attempt.attempt_id not in self.attempts:
            return
        del self.attempts[attempt.attempt_id]
        entry = attempt.entry
        entry.num_unsettled_attempts -= 1
        if entry.num_unsettled_attempts == 0:
            self.closing.pop(entry.serial, None)
