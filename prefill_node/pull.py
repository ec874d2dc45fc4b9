"""One pull as the prefill node sees it: the prefix of a prompt that comes from another node."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from kvrelay.core.block_hash import DigestedTokens, root_hash
from kvrelay.core.ids import TransferId
from kvrelay.core.node_messages import StartPrefill
from kvrelay.core.request import Prefix, TokenRequest
from kvrelay.engine.interface import Reservation, SequenceKey
from kvrelay.kv_transfer.interface import ExpectedTransfer
from kvrelay.node.attempt import Attempt, sequence_key


class PullState(StrEnum):
    """Where a pull is. It is forgotten when the engine has kept or freed its blocks, or has been asked to."""

    RESERVING = "reserving"
    """The engine has been asked for blocks."""
    RECEIVING = "receiving"
    """Blocks are taken; the KV is arriving."""
    CANCELLING = "cancelling"
    """It is given up; the transfer is being cancelled, so that nothing writes the blocks."""
    KEEPING = "keeping"
    """The KV is here; the engine has been asked to keep it, and the prompt is submitted behind that."""


@dataclass(slots=True, eq=False)
class Pull:
    """Mutable; owned by a prefill node's core. Of `attempt`'s prefix, the first `num_here_tokens` tokens were
    here already. The `followers` are attempts whose prompts begin with that prefix, too, and wait for it."""

    attempt: Attempt
    transfer_id: TransferId
    key: SequenceKey
    prefix: Prefix
    state: PullState = PullState.RESERVING
    num_here_tokens: int = 0
    followers: list[Attempt] = field(default_factory=list)

    def brings_prefix_of(self, request: TokenRequest) -> bool:
        """Whether the prompt begins with all that is on its way."""
        if self.state not in (PullState.RESERVING, PullState.RECEIVING):
            return False
        prefix = self.prefix
        return (
            prefix.cache_salt == request.cache_salt
            and prefix.token_ids == request.token_ids[: len(prefix.token_ids)]
        )

    @property
    def has_transfer(self) -> bool:
        return self.state in (PullState.RECEIVING, PullState.CANCELLING)

    def expected(self, reservation: Reservation, fingerprint_digest: bytes) -> ExpectedTransfer:
        """The transfer that brings what is not here; the other node may have less of it."""
        num_tokens, salt = len(self.prefix.token_ids), self.prefix.cache_salt
        tokens = DigestedTokens(self.prefix.token_ids, root_hash(salt, fingerprint_digest))
        return ExpectedTransfer(
            self.transfer_id,
            reservation.block_table,
            num_tokens,
            reservation.num_cached_tokens,
            tokens.digest(num_tokens),
            or_fewer=tokens,
        )


def new_pull(attempt: Attempt, command: StartPrefill) -> Pull:
    """The pull that the command orders."""
    assert command.pull is not None
    transfer_id = TransferId(attempt.router_epoch, command.pull.attempt)
    prefix = Prefix(command.request.token_ids[: command.pull.num_tokens], command.request.cache_salt)
    return Pull(attempt, transfer_id, sequence_key(transfer_id), prefix)
