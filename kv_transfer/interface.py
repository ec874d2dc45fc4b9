"""What nodes ask of KV transfer, and what they hear back.

A node has one `KVTransfer`. Who receives does `expect` a transfer; who sends does `open_push` it, feeds it
with `push_ready` and ends it with `finish_push`. In a handoff the prefill node sends while it computes, and
`finish_push` has the first token; in a pull any node sends what its prefix cache holds, and no token. All
calls come from the node's event loop except `push_ready`, which an engine thread may call. Outcomes come as
events, each transfer ending in exactly one, on the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvrelay.core.block_hash import BlockHash, DigestedTokens
from kvrelay.core.errors import KVRelayError
from kvrelay.core.ids import BlockId, TransferId


@dataclass(frozen=True, slots=True)
class ExpectedTransfer:
    """The receiver's side of a transfer.

    Tokens ``[first_token, num_tokens)`` of the sequence are to arrive in `block_table`, for all layers;
    `prompt_digest` is `sequence_digest` over all its token ids. With `or_fewer`, those tokens, the sender may
    offer just the first of them, as long as they are more than `first_token`.
    """

    transfer_id: TransferId
    block_table: Sequence[BlockId]
    num_tokens: int
    first_token: int
    prompt_digest: BlockHash
    or_fewer: DigestedTokens | None = None


@dataclass(frozen=True, slots=True)
class PushSpec:
    """The sender's side of a transfer. `peer_address` is the receiver's `KVTransfer.address`."""

    transfer_id: TransferId
    peer_address: str
    num_tokens: int
    prompt_digest: BlockHash


@dataclass(frozen=True, slots=True)
class TransferStats:
    """Measured by the side that reports it. `seconds` runs from grant to verified."""

    num_bytes: int
    num_messages: int
    seconds: float
    transport: str


@dataclass(frozen=True, slots=True)
class PushDone:
    """The receiver has acknowledged a verified whole."""

    transfer_id: TransferId
    stats: TransferStats


@dataclass(frozen=True, slots=True)
class PushFailed:
    """The transfer ended without an acknowledgement; nothing reads its blocks any more."""

    transfer_id: TransferId
    error: KVRelayError


@dataclass(frozen=True, slots=True)
class ReceiveDone:
    """Every byte of the sequence's first `num_tokens` tokens has arrived, been verified and scattered; the
    prefill drew `output_token_id`."""

    transfer_id: TransferId
    output_token_id: int
    stats: TransferStats
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ReceiveFailed:
    """The transfer ended without a verified whole; nothing writes its blocks any more."""

    transfer_id: TransferId
    error: KVRelayError


TransferEvent = PushDone | PushFailed | ReceiveDone | ReceiveFailed
TransferListener = Callable[[TransferEvent], None]


class KVTransfer(Protocol):
    """One node's end of all its KV transfers; see the module's text."""

    @property
    def address(self) -> str:
        """Where peers connect to, ``host:port``; known after `start`."""
        ...

    async def start(self) -> None: ...

    async def close(self) -> None:
        """End every transfer (each with its event) and free all resources."""
        ...

    def expect(self, expected: ExpectedTransfer) -> None:
        """Accept this transfer when its sender offers it, before or after this call.

        Raises:
            Overloaded: too many transfers are expected already.
        """
        ...

    def open_push(self, spec: PushSpec) -> None:
        """Connect (once per peer) and offer the transfer. Never blocks; failures come as `PushFailed`."""
        ...

    def push_ready(
        self, transfer_id: TransferId, block_table: Sequence[BlockId], layers: range, tokens: range
    ) -> None:
        """KV that may be sent now. Thread-safe. Unknown transfers are ignored."""
        ...

    def finish_push(self, transfer_id: TransferId, output_token_id: int) -> None:
        """All of the KV has been reported ready, and this token was drawn. Unknown transfers are ignored."""
        ...

    def refuse(self, transfer_id: TransferId) -> None:
        """Whoever has offered this transfer, or will, is told that nobody expects it. Not for one that was
        expected."""
        ...

    async def cancel(self, transfer_id: TransferId) -> None:
        """End a transfer without an event; on return nothing reads or writes its blocks any more.

        Unknown (or ended) transfers are ignored. The peer is told and sees its side fail.
        """
        ...
