"""The receiver's end of a link: answers `Hello`, and passes frames about transfers on."""

from __future__ import annotations

import socket
from typing import Protocol

from kvrelay.core.errors import KVRelayError, TransferFailed
from kvrelay.core.kv import KVFingerprint
from kvrelay.kv_transfer.connection import Connection, unexpected
from kvrelay.kv_transfer.local_node import LocalNode
from kvrelay.kv_transfer.messages import PROTOCOL_VERSION, Frame, Hello, Ping, Pong, Pump, Refuse
from kvrelay.kv_transfer.transport import KVTransport


class IncomingLinkOwner(Protocol):
    """Who hears of what comes over a link."""

    def on_hello(self, link: IncomingLink) -> None: ...

    def on_pump(self) -> None: ...

    def on_frame(self, link: IncomingLink, frame: Frame) -> None:
        """A frame about a transfer; a `KVRelayError` raised ends the link."""
        ...

    def lose(self, link: IncomingLink, error: KVRelayError) -> None: ...


class IncomingLink:
    """Owns the accepted socket. `peer` is known after the first frame."""

    def __init__(
        self,
        node: LocalNode,
        transport: KVTransport,
        owner: IncomingLinkOwner,
        sock: socket.socket,
        link_id: int,
    ) -> None:
        self.link_id = link_id
        self.peer: Hello | None = None
        self.accepted_s = node.clock()
        self._node = node
        self._transport = transport
        self._owner = owner
        self.connection = Connection(
            sock,
            node.watcher,
            node.clock,
            on_frame=self._on_frame,
            on_lost=self._on_lost,
            is_connecting=False,
        )

    @property
    def peer_name(self) -> str:
        return self.peer.node_id if self.peer else "a peer that did not say hello"

    @property
    def peer_fingerprint(self) -> KVFingerprint:
        assert self.peer is not None, "no frame about a transfer is passed on before Hello"
        return self.peer.fingerprint

    def _on_lost(self, error: KVRelayError) -> None:
        self._owner.lose(self, type(error)(f"{self.peer_name}: {error.message}"))

    def _on_frame(self, frame: Frame) -> None:
        if self.peer is None:
            if not isinstance(frame, Hello):
                raise unexpected(frame)
            self._on_hello(frame)
            return
        match frame:
            case Pump():
                self._owner.on_pump()
            case Ping():
                self.connection.send(Pong())
            case Pong():
                pass
            case _:
                self._owner.on_frame(self, frame)

    def _on_hello(self, hello: Hello) -> None:
        if hello.version != PROTOCOL_VERSION:
            raise self._refused(f"this node speaks version {PROTOCOL_VERSION}, the peer {hello.version}")
        if hello.transport != self._transport.name:
            raise self._refused(
                f"this node moves KV by {self._transport.name}, the peer by {hello.transport}"
            )
        self.peer = hello
        self._owner.on_hello(self)
        ticket = self._transport.admit(self.link_id)
        endpoint = self._transport.endpoint()
        self.connection.send(self._node.hello(self._transport, endpoint=endpoint, ticket=ticket))

    def _refused(self, message: str) -> TransferFailed:
        self.connection.send(Refuse(TransferFailed.code, message))
        return TransferFailed(message)
