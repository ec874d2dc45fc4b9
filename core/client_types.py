"""What clients and routers say to each other, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from kvrelay.core.errors import KVRelayError
from kvrelay.core.request import FinishReason, TokenLogprobs, TokenRequest
from kvrelay.core.request_report import RequestReport
from kvrelay.core.service_terms import DEFAULT_TERMS, ServiceTerms

MAX_REQUEST_ID_CHARS: Final = 128
MAX_MODEL_CHARS: Final = 256
MAX_STREAM_ID: Final = 2**32 - 1


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One request of a client. Empty `request_id`: the router draws one; empty `model`: the only one served.

    `timeout_s` counts from arrival at the router; None is the router's default.
    """

    request_id: str
    model: str
    request: TokenRequest
    timeout_s: float | None = None
    terms: ServiceTerms = DEFAULT_TERMS


@dataclass(frozen=True, slots=True)
class CallAccepted:
    """`seed` is the one that sampling uses, given or drawn; None when greedy."""

    request_id: str
    seed: int | None = None


@dataclass(slots=True)
class CallTokens:
    """The next tokens of one call. `logprobs` is empty, or has one entry per token."""

    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs | None] = ()


@dataclass(frozen=True, slots=True)
class CallFinished:
    """The call's end; all its tokens came before."""

    finish_reason: FinishReason
    report: RequestReport


CallEvent = CallAccepted | CallTokens | CallFinished


@dataclass(frozen=True, slots=True)
class SessionAsk:
    """What a client says in one session message: new calls by stream id, and stream ids to cancel or to
    finish (their clients have all they want).

    A call that could not be decoded stands here as the error that its stream is to be failed with.
    """

    calls: tuple[tuple[int, GenerateCall | KVRelayError], ...] = ()
    cancel: tuple[int, ...] = ()
    finish: tuple[int, ...] = ()


@dataclass(slots=True)
class SessionUpdate:
    """What a router says in one session message. Tokens in columns: entry i is `counts[i]` tokens for
    `stream_ids[i]`; `token_ids` holds all of them in a row; `logprobs` is empty, or has one entry per token.

    Order within one update: accepted, tokens, finished, failed.
    """

    stream_ids: Sequence[int] = ()
    counts: Sequence[int] = ()
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs | None] = ()
    accepted: list[tuple[int, CallAccepted]] = field(default_factory=list)
    finished: list[tuple[int, CallFinished]] = field(default_factory=list)
    failed: list[tuple[int, KVRelayError]] = field(default_factory=list)
