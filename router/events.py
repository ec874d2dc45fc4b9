"""What the router's core is told (events, past tense) and what it answers with (effects, imperative).

A *session* is where a request's output goes: one gRPC `Session` or `Generate` stream; `stream_id` tells
the requests of one session apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NewType

from kvrelay.core.errors import KVRelayError
from kvrelay.core.ids import NodeId, RequestId
from kvrelay.core.kv_events import KVEvent
from kvrelay.core.node_messages import Command, NodeDescription, NodeLoad, Report, TokenBatch
from kvrelay.core.request import FinishReason, TokenLogprobs, TokenRequest
from kvrelay.core.request_report import RequestReport as RequestReport

SessionId = NewType("SessionId", int)
"""A client stream of this router. A counter, never reused."""


# ---- events ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeAttached:
    """A node said hello. An earlier stream of the same `node_id` counts as lost first."""

    description: NodeDescription


@dataclass(frozen=True, slots=True)
class NodeLost:
    """The node's stream ended, or it was silent for too long. `incarnation` tells an old stream's end from
    a new one's."""

    node_id: NodeId
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class NodeReported:
    """One frame of a node: what happened to its blocks first, then tokens, then reports, then load."""

    node_id: NodeId
    tokens: TokenBatch | None = None
    reports: tuple[Report, ...] = ()
    load: NodeLoad | None = None
    kv: KVEvent | None = None


@dataclass(frozen=True, slots=True)
class RequestSubmitted:
    """A client asks. `deadline_s` is on the core's clock; None means the configured default."""

    request_id: RequestId
    session: SessionId
    stream_id: int
    model: str
    request: TokenRequest
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """By `Cancel`, in its own session or another; unknown ids are the shell's to refuse."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class RequestSatisfied:
    """Its client has all it wants, since the text met a stop string: it ends as finished."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """The client went away: all its requests are cancelled, and nothing more is delivered."""

    session: SessionId


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed: deadlines and queue time-outs are checked. Sent several times a second."""


@dataclass(frozen=True, slots=True)
class LookDue:
    """The time that the core named by `look_again_s` has come: what is queued is looked at."""


Event = (
    NodeAttached
    | NodeLost
    | NodeReported
    | RequestSubmitted
    | RequestCancelled
    | RequestSatisfied
    | SessionClosed
    | Ticked
    | LookDue
)


# ---- effects ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendCommand:
    """Send to that node; if it is gone, `NodeLost` follows anyway."""

    node_id: NodeId
    command: Command


@dataclass(slots=True)
class DeliverTokens:
    """Tokens for one session, in columns: entry i is `counts[i]` tokens for `stream_ids[i]`.

    Each stream's tokens come in order, exactly once. `logprobs` is empty, or has one entry per token.
    """

    session: SessionId
    stream_ids: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class DeliverFinished:
    """The request is done; its tokens were delivered before."""

    session: SessionId
    stream_id: int
    request_id: RequestId
    finish_reason: FinishReason
    report: RequestReport


@dataclass(frozen=True, slots=True)
class DeliverFailed:
    """The request failed; nothing more comes for it."""

    session: SessionId
    stream_id: int
    request_id: RequestId
    error: KVRelayError


Effect = SendCommand | DeliverTokens | DeliverFinished | DeliverFailed
