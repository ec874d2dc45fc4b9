"""What a node's core is told (events, past tense) and what it answers with (effects, imperative)."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvrelay.core.errors import KVRelayError
from kvrelay.core.ids import TransferId
from kvrelay.core.node_messages import Command, Report, Welcome
from kvrelay.core.request import TokenLogprobs, TokenRequest
from kvrelay.engine.interface import Reservation, SequenceKey, StepOutput
from kvrelay.kv_transfer.interface import ExpectedTransfer, PushSpec, TransferEvent

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
class SequenceRefused:
    """The engine did not take the sequence, and holds nothing of it."""

    key: SequenceKey
    error: KVRelayError


@dataclass(frozen=True, slots=True)
class SequenceReleased:
    """The engine holds nothing of the sequence any more."""

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
    SequenceReserved | SequenceRefused | SequenceReleased | PrefillStarted | StepFinished | EngineDied
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


@dataclass(slots=True)
class TokenColumns:
    """A `TokenBatch` while it grows. `logprobs` is empty, or has one entry per token."""

    attempts: list[int] = field(default_factory=list)
    first_indices: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    def append(self, attempt: int, index: int, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """One token of one attempt."""
        if logprobs is not None or self.logprobs:
            self._pad_logprobs()
            self.logprobs.append(logprobs)
        self.attempts.append(attempt)
        self.first_indices.append(index)
        self.counts.append(1)
        self.token_ids.append(token_id)

    def extend(self, other: TokenColumns) -> None:
        """Append all of `other`."""
        if other.logprobs or self.logprobs:
            self._pad_logprobs()
            self.logprobs.extend(other.logprobs or [None] * len(other.token_ids))
        self.attempts.extend(other.attempts)
        self.first_indices.extend(other.first_indices)
        self.counts.extend(other.counts)
        self.token_ids.extend(other.token_ids)

    def _pad_logprobs(self) -> None:
        self.logprobs.extend([None] * (len(self.token_ids) - len(self.logprobs)))


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
class ReleaseSequence:
    """Answered by `SequenceReleased`, always."""

    key: SequenceKey


@dataclass(frozen=True, slots=True)
class TellKVSnapshot:
    """Tell that router all that the prefix cache holds, if it is connected."""

    router_epoch: int


EngineCommand = SubmitPrefill | ReserveSequence | StartDecode | ReleaseSequence


@dataclass(frozen=True, slots=True)
class OpenPush:
    """Offer a transfer to its receiver."""

    spec: PushSpec


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
class CancelTransfer:
    """Answered by `TransferCancelled`, always."""

    transfer_id: TransferId


TransferCommand = OpenPush | FinishPush | ExpectTransfer | CancelTransfer
NodeEffect = SendFrame | CloseRouter | TellKVSnapshot | EngineCommand | TransferCommand
