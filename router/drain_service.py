"""The client-facing call by which an operator has a node leave: `DrainNode`."""

from __future__ import annotations

import logging

from kvrelay.codec.client_api import decode_drain_node
from kvrelay.core.errors import Overloaded, UnknownNode
from kvrelay.core.node_messages import StartDrain
from kvrelay.router.attachments import Attachments
from kvrelay.router.grpc_handlers import Context
from kvrelay.v1 import router_pb2

logger = logging.getLogger(__name__)


class DrainService:
    """Passes the word on. The node tells all its routers that it drains, this one too."""

    def __init__(self, attachments: Attachments) -> None:
        self._attachments = attachments

    async def drain_node(
        self, request: router_pb2.DrainNodeRequest, context: Context
    ) -> router_pb2.DrainNodeResponse:
        """Tell a node to leave; one that drains already is told in vain.

        Raises:
            UnknownNode: it is not attached here.
            Overloaded: it does not read what it is sent.
        """
        node_id = decode_drain_node(request)
        attachment = self._attachments.by_node.get(node_id)
        if attachment is None:
            raise UnknownNode(f"no node {node_id!r} is attached to this router", field="node_id")
        if not attachment.outbox.put(StartDrain()):
            raise Overloaded(f"node {node_id} does not read: too many commands wait for it")
        logger.info("node=%s is asked to drain", node_id)
        return router_pb2.DrainNodeResponse()
