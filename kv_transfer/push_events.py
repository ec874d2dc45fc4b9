"""What happens to a push, and what it asks for: the vocabulary of `PushSession`."""

from __future__ import annotations

from dataclasses import dataclass

from kvrelay.core.errors import KVRelayError
from kvrelay.core.ids import BlockId
from kvrelay.kv_transfer.kv_range import KVRange
from kvrelay.kv_transfer.messages import Frame


@dataclass(frozen=True, slots=True)
class LinkOpened:
    """The receiver is reachable; a message may have up to `max_message_bytes`."""

    max_message_bytes: int


@dataclass(frozen=True, slots=True)
class OfferGranted:
    """The receiver wants tokens from `first_token` on."""

    first_token: int


@dataclass(frozen=True, slots=True)
class KVReported:
    """The engine has computed `part`; `block_table` covers at least its tokens."""

    block_table: tuple[BlockId, ...]
    part: KVRange


@dataclass(frozen=True, slots=True)
class RemoteSlotsGranted:
    """The receiver gave these slots to this transfer."""

    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WriteFinished:
    """The message is in the receiver's slot, or was dropped because the session no longer wants it."""

    sequence_number: int
    checksum: int | None


@dataclass(frozen=True, slots=True)
class FinishRequested:
    """The prefill is done and drew this token."""

    output_token_id: int


@dataclass(frozen=True, slots=True)
class PushAcked:
    """The receiver has verified everything."""


@dataclass(frozen=True, slots=True)
class PushAborted:
    """The receiver gave up, or refused the offer."""

    error: KVRelayError


@dataclass(frozen=True, slots=True)
class PushGivenUp:
    """This side gives up with `error`, or without a word to the caller when that is None."""

    error: KVRelayError | None


@dataclass(frozen=True, slots=True)
class PushLinkLost:
    """The receiver can't be reached any more."""

    error: KVRelayError


@dataclass(frozen=True, slots=True)
class PushTicked:
    """Time has passed."""


PushEvent = (
    LinkOpened
    | OfferGranted
    | KVReported
    | RemoteSlotsGranted
    | WriteFinished
    | FinishRequested
    | PushAcked
    | PushAborted
    | PushGivenUp
    | PushLinkLost
    | PushTicked
)


@dataclass(frozen=True, slots=True)
class SendToReceiver:
    """Send this frame over the link."""

    frame: Frame


@dataclass(frozen=True, slots=True)
class WriteMessage:
    """Gather `part`, write it into the receiver's `slot`; the outcome comes back as `WriteFinished`."""

    sequence_number: int
    slot: int
    block_table: tuple[BlockId, ...]
    part: KVRange
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ReportPush:
    """Tell the caller. `error` None is success."""

    error: KVRelayError | None
    num_bytes: int
    num_messages: int
    seconds: float


PushEffect = SendToReceiver | WriteMessage | ReportPush
