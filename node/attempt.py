"""One attempt as a node sees it: its state, and what the node holds for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from kvrelay.core.block_hash import BlockHash, root_hash, sequence_digest
from kvrelay.core.errors import KVRelayError
from kvrelay.core.ids import AttemptId, TransferId
from kvrelay.core.node_messages import AttemptFailed, AttemptRefused, HoldCommand, Report
from kvrelay.core.request import Prefix, TokenRequest
from kvrelay.engine.interface import SequenceKey


class AttemptState(StrEnum):
    """Where an attempt is. The first three belong to prefill nodes, the next three to decode nodes, the two
    behind them to nodes that send a prefix: either."""

    PULLING = "pulling"
    """A part of the prompt's KV is on its way from another node; the engine knows nothing of the sequence."""
    PREFILLING = "prefilling"
    """The sequence waits or computes in the engine; the push is open."""
    HANDING_OFF = "handing_off"
    """The first token is out; the KV is held until the receiver has acknowledged it."""

    RESERVING = "reserving"
    """The engine has been asked for blocks."""
    RECEIVING = "receiving"
    """Blocks are taken; the KV is arriving."""
    DECODING = "decoding"
    """The KV is here; the engine owns the sequence until it finishes."""

    PINNING = "pinning"
    """The engine has been asked to hold what it has of the prefix."""
    SENDING = "sending"
    """It is held, and being pushed."""

    CANCELLING = "cancelling"
    """The end is decided; the transfer is being cancelled, so that nothing touches the blocks."""
    RELEASING = "releasing"
    """No transfer is open; the engine has been asked to free the sequence."""


Transitions = Mapping[AttemptState, frozenset[AttemptState]]

ENDING: Final = frozenset({AttemptState.CANCELLING, AttemptState.RELEASING})
"""The end is decided, and what is held is on its way back."""


PUSHED: Final = frozenset({AttemptState.HANDING_OFF, AttemptState.SENDING})
"""All of the KV has been given to the push."""


@dataclass(slots=True)
class Attempt:
    """Mutable; owned by a node's core.

    `has_transfer` is whether its own transfer is open. `terminal` is the report that ends the attempt, once
    decided. `is_orphan`: the stream it came by is gone, and nobody is to hear of it any more. `submitted_s`:
    when its pull was over, or the command came if it has none.
    """

    transfer_id: TransferId
    key: SequenceKey
    command: HoldCommand
    state: AttemptState
    received_s: float
    has_transfer: bool = False
    is_orphan: bool = False
    terminal: Report | None = None
    submitted_s: float = 0.0
    started_s: float | None = None
    num_cached_tokens: int = 0
    num_pulled_tokens: int = 0
    pull_error: str = ""

    @property
    def number(self) -> AttemptId:
        """Its name towards its router."""
        return self.transfer_id.attempt

    @property
    def router_epoch(self) -> int:
        """Whose it is."""
        return self.transfer_id.router_epoch


def sequence_key(transfer_id: TransferId) -> SequenceKey:
    """The engine's name for an attempt's sequence; no two attempts share it."""
    return SequenceKey(str(transfer_id))


def refusal(attempt: AttemptId, error: KVRelayError) -> AttemptRefused:
    """What is reported of an attempt that was not taken up."""
    return AttemptRefused(attempt, error.code, error.message, error.field or "")


def failure(attempt: AttemptId, error: KVRelayError) -> AttemptFailed:
    """What is reported of an attempt that came to nothing."""
    return AttemptFailed(attempt, error.code, error.message, error.field or "")


def prompt_digest(tokens: TokenRequest | Prefix, fingerprint_digest: bytes) -> BlockHash:
    """What both sides of a transfer agree on: the tokens, their salt, the KV's fingerprint."""
    return sequence_digest(tokens.token_ids, root_hash(tokens.cache_salt, fingerprint_digest))
