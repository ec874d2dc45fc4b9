"""What is asked of a node by its id. It may be attached to some of the routers only, so all are asked."""

from __future__ import annotations

from kvrelay.client.config import ClientConfig
from kvrelay.client.router_link import RouterLink
from kvrelay.client.router_set import RouterSet
from kvrelay.codec.bounds import text
from kvrelay.codec.client_api import encode_drain_node
from kvrelay.codec.node_hello import MAX_NAME_CHARS
from kvrelay.core.errors import InvalidRequest, UnknownNode


class NamedNodes:
    """Used on one event loop."""

    def __init__(self, routers: RouterSet, config: ClientConfig) -> None:
        self._routers = routers
        self._config = config

    async def drain(self, node_id: str) -> None:
        """See `AsyncClient.drain_node`."""
        if not isinstance(node_id, str):
            raise InvalidRequest(f"node_id must be a string, got {node_id!r}", field="node_id")
        text(node_id, "node_id", MAX_NAME_CHARS, is_required=True)

        async def drain_at(link: RouterLink) -> None:
            await link.stub.DrainNode(encode_drain_node(node_id), timeout=self._config.call_timeout_s)

        outcomes = await self._routers.call_each(drain_at)
        errors = [error for error in outcomes.values() if error is not None]
        if len(errors) == len(outcomes):
            raise next((error for error in errors if not isinstance(error, UnknownNode)), errors[0])
