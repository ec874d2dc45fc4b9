"""The nodes' streams: which node speaks on which, when it was last heard, what waits to be sent to it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

from kvrelay.core.errors import KVRelayError, NodeUnavailable, Overloaded
from kvrelay.core.ids import NodeId
from kvrelay.core.node_messages import NodeDescription
from kvrelay.core.tokenizer_chunk import TokenizerAssembly
from kvrelay.router.node_outbox import NodeOutbox

MAX_TICK_GAP_S: Final = 1.0
"""When the ticker comes later than this, it was the router that stood still, not its nodes."""


@dataclass(slots=True, eq=False)
class Attachment:
    """One node's stream. `ended` is set once: to the reason, or to the node's fault. `tokenizer` collects its
    bundle, if the router wants it."""

    description: NodeDescription
    outbox: NodeOutbox
    ended: asyncio.Future[KVRelayError]
    last_heard_s: float
    last_sent_s: float
    tokenizer: TokenizerAssembly | None = None

    @property
    def node_id(self) -> NodeId:
        return self.description.node_id

    def end(self, reason: KVRelayError) -> None:
        """Have the stream ended; the first reason counts."""
        if not self.ended.done():
            self.ended.set_result(reason)


@dataclass(slots=True, eq=False)
class Attachments:
    """The current stream of each node; the newest one wins."""

    max_nodes: int
    max_buffered_commands: int
    heartbeat_s: float
    node_silence_s: float
    by_node: dict[NodeId, Attachment] = field(default_factory=dict)
    last_tick_s: float | None = None

    def add(self, description: NodeDescription, now_s: float) -> Attachment:
        """A node's new stream; an earlier one of the same node is ended.

        Raises:
            Overloaded: `max_nodes` are attached.
        """
        earlier = self.by_node.get(description.node_id)
        if earlier is None and len(self.by_node) >= self.max_nodes:
            raise Overloaded(f"max_nodes ({self.max_nodes}) nodes are attached already")
        if earlier is not None:
            earlier.end(NodeUnavailable(f"node {description.node_id} attached anew"))
        ended: asyncio.Future[KVRelayError] = asyncio.get_running_loop().create_future()
        outbox = NodeOutbox(self.max_buffered_commands)
        attachment = Attachment(description, outbox, ended, now_s, now_s)
        self.by_node[description.node_id] = attachment
        return attachment

    def is_current(self, attachment: Attachment) -> bool:
        """Whether it is still its node's stream."""
        return self.by_node.get(attachment.node_id) is attachment

    def remove(self, attachment: Attachment) -> bool:
        """Forget a stream that has ended; False if another took its place before."""
        if not self.is_current(attachment):
            return False
        del self.by_node[attachment.node_id]
        return True

    def models(self) -> list[str]:
        """The models that attached nodes serve, sorted."""
        return sorted({attachment.description.model for attachment in self.by_node.values()})

    def tick(self, now_s: float) -> list[Attachment]:
        """Make due heartbeats; returns the nodes that have been silent for too long."""
        gap_s = 0.0 if self.last_tick_s is None else now_s - self.last_tick_s
        self.last_tick_s = now_s
        silent = []
        for attachment in self.by_node.values():
            if gap_s > MAX_TICK_GAP_S:
                attachment.last_heard_s = min(now_s, attachment.last_heard_s + gap_s)
            if now_s - attachment.last_heard_s > self.node_silence_s:
                silent.append(attachment)
            if now_s - attachment.last_sent_s >= self.heartbeat_s:
                attachment.last_sent_s = now_s
                attachment.outbox.put_heartbeat()
        return silent
