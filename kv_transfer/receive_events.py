"""What happens to a receive, and what it asks for: the vocabulary of `ReceiveSession`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.core.errors import KVRelayError
from kvrelay.core.ids import BlockId
from kvrelay.core.kv import KVFingerprint
from kvrelay.kv_transfer.kv_range import KVRange
from kvrelay.kv_transfer.messages import Chunk, Finish, Frame, Offer


@dataclass(frozen=True, slots=True)
class OfferMatched:
    """The expected transfer was offered by a peer with that fingerprint."""

    offer: Offer
    peer_fingerprint: KVFingerprint


@dataclass(frozen=True, slots=True)
class SlotsWanted:
    """The sender has so many more messages ready."""

    num_slots: int


@dataclass(frozen=True, slots=True)
class SlotsAssigned:
    """The pool has given these slots to the transfer."""

    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SlotsGivenBack:
    """The sender has no use for these granted slots now."""

    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunkArrived:
    """A message lies in one of the granted slots."""

    chunk: Chunk


@dataclass(frozen=True, slots=True)
class MessageScattered:
    """One of the messages that `ScatterMessage` asked for is in the cache."""


@dataclass(frozen=True, slots=True)
class FinishArrived:
    """The sender has sent everything."""

    finish: Finish


@dataclass(frozen=True, slots=True)
class ReceiveAborted:
    """The sender gave up."""

    error: KVRelayError


@dataclass(frozen=True, slots=True)
class ReceiveGivenUp:
    """This side gives up with `error`, or without a word to the caller when that is None."""

    error: KVRelayError | None


@dataclass(frozen=True, slots=True)
class ReceiveLinkLost:
    """The sender can't be reached any more."""

    error: KVRelayError


@dataclass(frozen=True, slots=True)
class ReceiveTicked:
    """Time has passed."""


ReceiveEvent = (
    OfferMatched
    | SlotsWanted
    | SlotsAssigned
    | SlotsGivenBack
    | ChunkArrived
    | MessageScattered
    | FinishArrived
    | ReceiveAborted
    | ReceiveGivenUp
    | ReceiveLinkLost
    | ReceiveTicked
)


@dataclass(frozen=True, slots=True)
class SendToSender:
    """Send this frame over the link."""

    frame: Frame


@dataclass(frozen=True, slots=True)
class RequestSlots:
    """Queue at the pool for so many slots."""

    num_slots: int


@dataclass(frozen=True, slots=True)
class ScatterMessage:
    """Verify `slot`, scatter `part` from it, free it.

    Comes back as `MessageScattered`, a wrong checksum as `ReceiveGivenUp`.
    """

    slot: int
    block_table: Sequence[BlockId]
    part: KVRange
    num_bytes: int
    checksum: int | None


@dataclass(frozen=True, slots=True)
class FreeSlots:
    """Nobody will write to these any more; None: to any of the transfer's, and it waits for none."""

    slots: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class QuarantineSlots:
    """The sender may still write to the transfer's slots until it says `Released`."""


@dataclass(frozen=True, slots=True)
class ReportReceive:
    """Tell the caller. `error` None is success: the first `num_tokens` tokens are here, and the prefill drew
    `output_token_id`."""

    error: KVRelayError | None
    output_token_id: int
    num_tokens: int
    num_bytes: int
    num_messages: int
    seconds: float


ReceiveEffect = SendToSender | RequestSlots | ScatterMessage | FreeSlots | QuarantineSlots | ReportReceive
