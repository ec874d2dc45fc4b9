"""What routers and nodes say to each other over `Attach`, as plain values.

A router sends commands, a node reports. Both name an attempt by `AttemptId`; a node serving several
routers keeps them apart by the router's epoch (together: `TransferId`). Each command that makes a node
hold KV is answered by exactly one *terminal* report, after which the node holds nothing of that attempt:
`AttemptRefused`, `AttemptFinished`, `AttemptFailed` or `KVReleased`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from kvrelay.core.ids import AttemptId, NodeId
from kvrelay.core.kv import KVFingerprint
from kvrelay.core.kv_events import KVEvent
from kvrelay.core.request import FinishReason, Prefix, TokenRequest
from kvrelay.core.token_batch import TokenBatch as TokenBatch
from kvrelay.core.tokenizer_chunk import TokenizerChunk


class Role(StrEnum):
    """What a node does."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class NodeDescription:
    """Who a node is; sent first on every `Attach`.

    `incarnation` is drawn anew when the process starts. `transfer_address` is where others send KV to; empty
    on a prefill node that takes none. `tokenizer_digest` names its tokenizer bundle, empty if it has none.
    """

    node_id: NodeId
    incarnation: int
    role: Role
    model: str
    engine: str
    fingerprint: KVFingerprint
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    eos_token_ids: tuple[int, ...] = ()
    transfer_address: str = ""
    transport: str = ""
    tokenizer_digest: str = ""
    host: str = ""
    pid: int = 0
    version: str = ""


@dataclass(frozen=True, slots=True)
class Welcome:
    """A router's first frame. The node releases what it still holds of an earlier stream of this epoch,
    because a router counts a node as lost when its stream ends."""

    router_id: str
    router_epoch: int
    heartbeat_s: float
    lease_s: float
    wants_tokenizer: bool = False


# ---- commands: router -> node ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PullOrder:
    """The KV of the request's first `num_tokens` tokens comes from another node, which is told to send it as
    `attempt`: an id of its own."""

    attempt: AttemptId
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StartPrefill:
    """Take the prefix of `pull`, if there is one; compute the KV, push it to `decode_address` while it is
    computed, draw the first token. What can't be pulled is computed."""

    attempt: AttemptId
    request: TokenRequest
    decode_address: str
    pull: PullOrder | None = None


@dataclass(frozen=True, slots=True)
class ReserveDecode:
    """Take blocks for this sequence, expect its KV, then decode."""

    attempt: AttemptId
    request: TokenRequest


@dataclass(frozen=True, slots=True)
class SendPrefix:
    """Send what the prefix cache holds of `prefix` to the node at `address`, which pulls it. Nodes of either
    role can. The hold ends by itself, with `KVReleased`, when the other has it."""

    attempt: AttemptId
    prefix: Prefix
    address: str


@dataclass(frozen=True, slots=True)
class StopPull:
    """The prefix that prefill `attempt` pulls will not come: compute it. Not answered."""

    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class ReleaseKV:
    """Stop, free everything, answer with `KVReleased` (also when nothing is held)."""

    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class SendKVSnapshot:
    """KV events are missing: send all that the node holds, in events, before the changes that follow."""


@dataclass(frozen=True, slots=True)
class StartDrain:
    """Somebody wants the node to leave: take nothing new, finish or hand back what is held, and end."""


HoldCommand = StartPrefill | ReserveDecode | SendPrefix
AttemptCommand = HoldCommand | StopPull | ReleaseKV
Command = AttemptCommand | SendKVSnapshot | StartDrain


# ---- reports: node -> router -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reserved:
    """Decode node: blocks are taken; the first `num_cached_tokens` are here already."""

    attempt: AttemptId
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class PrefillFinished:
    """Prefill node: the first token is out (in this frame's batch); its KV is held until the handoff ends.

    It has pulled `num_pulled_tokens` tokens within `pull_s`, then waited for `queue_s`, then computed for
    `compute_s`. `num_cached_tokens` were in the prefix cache when its turn came, pulled ones included.
    `pull_error` is the code of what kept it from pulling; empty: nothing did.
    """

    attempt: AttemptId
    num_cached_tokens: int
    queue_s: float
    compute_s: float
    num_pulled_tokens: int = 0
    pull_s: float = 0.0
    pull_error: str = ""


@dataclass(frozen=True, slots=True)
class HandoffVerified:
    """Decode node: the whole KV has arrived and been verified; decoding starts."""

    attempt: AttemptId
    num_bytes: int
    num_messages: int
    seconds: float
    transport: str


@dataclass(frozen=True, slots=True)
class AttemptRefused:
    """Terminal: there is no room, the node drains, or it can't serve such a request; nothing was taken.

    `field` names the request's field at fault; empty: none.
    """

    attempt: AttemptId
    code: str
    message: str
    field: str = ""


@dataclass(frozen=True, slots=True)
class AttemptFinished:
    """Terminal: the last token is out (in this frame's batch) and the KV is freed."""

    attempt: AttemptId
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """Terminal: the engine or the handoff failed; the KV is freed. `field` as in `AttemptRefused`."""

    attempt: AttemptId
    code: str
    message: str
    field: str = ""


@dataclass(frozen=True, slots=True)
class KVReleased:
    """Terminal: answer to `ReleaseKV`; or a sender's hold ended as the receiver acknowledged the whole."""

    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class DrainStarted:
    """The node takes no new attempts and leaves when those it has are done."""


Report = (
    Reserved
    | PrefillFinished
    | HandoffVerified
    | AttemptRefused
    | AttemptFinished
    | AttemptFailed
    | KVReleased
    | DrainStarted
)


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """How busy a node is: the figures of its engine, and what it holds for attempts.

    ``num_held_blocks + num_cached_blocks + num_empty_blocks == num_blocks``; with no attempt live,
    `num_held_blocks` is 0, or blocks have leaked. Of the `prefix_hit_tokens`, `host_hit_tokens` came from the
    host tier, which uses `num_used_host_blocks` of `num_host_blocks`.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_reserved: int = 0
    num_held_blocks: int = 0
    num_cached_blocks: int = 0
    num_empty_blocks: int = 0
    num_preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    num_attempts: int = 0
    num_open_transfers: int = 0
    num_host_blocks: int = 0
    num_used_host_blocks: int = 0
    host_hit_tokens: int = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that a new sequence could take."""
        return self.num_cached_blocks + self.num_empty_blocks


@dataclass(frozen=True, slots=True)
class NodeFrame:
    """All that a node has to say at one moment: at most one frame per engine step. Empty: a heartbeat.

    `tokenizer` is a part of its tokenizer bundle, sent after a `Welcome` that wants it. `kv` says what its
    prefix cache holds.
    """

    tokens: TokenBatch | None = None
    reports: tuple[Report, ...] = ()
    load: NodeLoad | None = None
    tokenizer: TokenizerChunk | None = None
    kv: KVEvent | None = None


@dataclass(frozen=True, slots=True)
class RouterFrame:
    """All that a router has to say at one moment. Empty: a heartbeat."""

    commands: tuple[Command, ...] = field(default=())
