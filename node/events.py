"""What a node's core is told (events, past tense) and what it answers with (effects, imperative)."""

from __future__ import annotations

from dataclasses import dataclass

from kvrelay.core.errors import KVRelayError
from kvrelay.core.ids import BlockId, TransferId
from kvrelay.core.node_messages import Command, Report, Welcome
from kvrelay.core.request import Prefix, TokenRequest
from kvrelay.engine.interface import Reservation, SequenceKey, StepOutput
from kvrelay.kv_transfer.interface import ExpectedTransfer, PushSpec, TransferEvent
from kvrelay.node.token_columns import TokenColumns as TokenColumns

# ---- events ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RouterConnected:
    """A router has welcomed this node on a new stream."""

    welcome: Welcome


@dataclass(frozen=True, slots=True)
class RouterFrameReceived:
    """Something was heard from a router: commands, or a heartbeat if there are none."""

    router_epoch: int
    commands: tuple[Command, ...] = ()


@dataclass(frozen=True, slots=True)
class RouterStreamLost:
    """The stream to that router has ended; what it holds here stays until its lease runs out."""

    router_epoch: int


@dataclass(frozen=True, slots=True)
class SequenceReserved:
    """The engine has taken the blocks that `ReserveSequence` asked for."""

    reservation: Reservation


@dataclass(frozen=True, slots=True)
class PrefixHeld:
    """The engine holds the blocks that `PinPrefix` or `ReservePrefix` asked for."""

    reservation: Reservation


@dataclass(frozen=True, slots=True)
class PrefixKept:
    """So many tokens of the prefix are in the prefix cache, 0: what came was seen to be wrong. The engine
    holds nothing of it any more."""

    key: SequenceKey
    num_tokens: int


@dataclass(frozen=True, slots=True)
class SequenceRefused:
    """The engine did not take the sequence, or the prefix, and holds nothing of it."""

    key: SequenceKey
    error: KVRelayError


@dataclass(frozen=True, slots=True)
class SequenceReleased:
    """The engine holds nothing of the sequence, or the prefix, any more."""

    key: SequenceKey


@dataclass(frozen=True, slots=True)
class PrefillStarted:
    """A prefill's turn has come: it is computed from `started_s` on, behind nothing else."""

    key: SequenceKey
    started_s: float
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class StepFinished:
    """The engine has computed one batch."""

    step: StepOutput


@dataclass(frozen=True, slots=True)
class EngineDied:
    """The engine raised: a bug. Nothing can be served any more, and the process is about to end."""

    message: str


@dataclass(frozen=True, slots=True)
class TransferCancelled:
    """`CancelTransfer` is done: nothing reads or writes the transfer's blocks any more."""

    transfer_id: TransferId


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """The node is to leave: it takes no new attempts."""


@dataclass(frozen=True, slots=True)
class DrainTimedOut:
    """The time for draining is over: what is still held is to be handed back."""


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed: leases are checked."""


EngineEvent = (
    SequenceReserved
    | PrefixHeld
    | PrefixKept
    | SequenceRefused
    | SequenceReleased
    | PrefillStarted
    | StepFinished
    | EngineDied
)
NodeEvent = (
    RouterConnected
    | RouterFrameReceived
    | RouterStreamLost
    | EngineEvent
    | TransferEvent
    | TransferCancelled
    | DrainRequested
    | DrainTimedOut
    | Ticked
)


# ---- effects ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendFrame:
    """Tell that router; tokens come before reports. Dropped if it is not connected."""

    router_epoch: int
    tokens: TokenColumns | None
    reports: tuple[Report, ...]


@dataclass(frozen=True, slots=True)
class CloseRouter:
    """End the stream to that router, if there still is one."""

    router_epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class SubmitPrefill:
    """Answered by `SequenceRefused`, or by `PrefillStarted` and an output of the sequence."""

    key: SequenceKey
    request: TokenRequest
    transfer_id: TransferId


@dataclass(frozen=True, slots=True)
class ReserveSequence:
    """Answered by `SequenceReserved` or `SequenceRefused`."""

    key: SequenceKey
    request: TokenRequest


@dataclass(frozen=True, slots=True)
class StartDecode:
    """The reserved sequence's KV is here."""

    key: SequenceKey
    first_token_id: int


@dataclass(frozen=True, slots=True)
class PinPrefix:
    """Hold what the prefix cache has of it. Answered by `PrefixHeld` or `SequenceRefused`."""

    key: SequenceKey
    prefix: Prefix


@dataclass(frozen=True, slots=True)
class ReservePrefix:
    """Take blocks for it. Answered by `PrefixHeld` or `SequenceRefused`."""

    key: SequenceKey
    prefix: Prefix


@dataclass(frozen=True, slots=True)
class KeepPrefix:
    """The first `num_tokens` tokens of a reserved prefix are here. Answered by `PrefixKept`."""

    key: SequenceKey
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ReleaseSequence:
    """Answered by `SequenceReleased`, always."""

    key: SequenceKey


@dataclass(frozen=True, slots=True)
class TellKVSnapshot:
    """Tell that router all that the prefix cache holds, if it is connected."""

    router_epoch: int


@dataclass(frozen=True, slots=True)
class BeginDrain:
    """The process is to drain and end, as if it had got SIGTERM. `DrainRequested` follows."""


EngineCommand = (
    SubmitPrefill | ReserveSequence | StartDecode | PinPrefix | ReservePrefix | KeepPrefix | ReleaseSequence
)


@dataclass(frozen=True, slots=True)
class OpenPush:
    """Offer a transfer to its receiver."""

    spec: PushSpec


@dataclass(frozen=True, slots=True)
class PushPrefix:
    """The opened transfer's KV of all layers is in those blocks, and that is all of it."""

    transfer_id: TransferId
    block_table: tuple[BlockId, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class FinishPush:
    """All of the transfer's KV is ready, and this token was drawn."""

    transfer_id: TransferId
    output_token_id: int


@dataclass(frozen=True, slots=True)
class ExpectTransfer:
    """Accept a transfer from its sender."""

    expected: ExpectedTransfer


@dataclass(frozen=True, slots=True)
class RefuseTransfer:
    """Whoever offers this transfer is told that nobody expects it. Of one that was not expected; not
    answered."""

    transfer_id: TransferId


@dataclass(frozen=True, slots=True)
class CancelTransfer:
    """Answered by `TransferCancelled`, always."""

    transfer_id: TransferId


TransferCommand = OpenPush | PushPrefix | FinishPush | ExpectTransfer | RefuseTransfer | CancelTransfer
NodeEffect = SendFrame | CloseRouter | TellKVSnapshot | BeginDrain | EngineCommand | TransferCommand
