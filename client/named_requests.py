"""What is asked about a request by its id. Each router knows its own requests only, so all are asked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from kvrelay.client.config import ClientConfig
from kvrelay.client.router_link import RouterLink
from kvrelay.client.router_set import RouterSet, unreadable
from kvrelay.codec.bounds import text
from kvrelay.codec.client_api import decode_explanation, encode_cancel, encode_explain
from kvrelay.core.client_types import MAX_REQUEST_ID_CHARS
from kvrelay.core.errors import InvalidRequest, KVRelayError, UnknownRequest
from kvrelay.core.explanation import Explanation


class NamedRequests:
    """Used on one event loop."""

    def __init__(self, routers: RouterSet, config: ClientConfig) -> None:
        self._routers = routers
        self._config = config

    async def cancel(self, request_id: str) -> None:
        """See `AsyncClient.cancel`."""
        _check(request_id)

        async def cancel_at(link: RouterLink) -> None:
            await link.stub.Cancel(encode_cancel(request_id), timeout=self._config.call_timeout_s)

        outcomes = await self._routers.call_each(cancel_at)
        if None not in outcomes.values():
            raise _why_none(outcomes)

    async def cancel_leftover(self, address: str, request_id: str) -> None:
        """Have one router let go of an attempt whose session was lost, which it may not have noticed yet.
        What came of that, the next attempt will show."""

        async def cancel_at(link: RouterLink) -> None:
            await link.stub.Cancel(encode_cancel(request_id), timeout=self._config.call_timeout_s)

        with suppress(KVRelayError):
            await self._routers.call_at(address, cancel_at)

    async def explain(self, request_id: str) -> Explanation:
        """See `AsyncClient.explain`."""
        _check(request_id)
        found: list[Explanation] = []

        async def explain_at(link: RouterLink) -> None:
            pb = await link.stub.Explain(encode_explain(request_id), timeout=self._config.call_timeout_s)
            try:
                found.append(decode_explanation(pb))
            except InvalidRequest as error:
                raise unreadable(link.address, error) from error

        outcomes = await self._routers.call_each(explain_at)
        if not found:
            raise _why_none(outcomes)
        # Several know a request that went on through another router; the latest to place it has it now.
        return min(found, key=lambda explanation: explanation.placed_ago_s)


def _check(request_id: str) -> None:
    if not isinstance(request_id, str):
        raise InvalidRequest(f"request_id must be a string, got {request_id!r}", field="request_id")
    text(request_id, "request_id", MAX_REQUEST_ID_CHARS, is_required=True)


def _why_none(outcomes: Mapping[str, KVRelayError | None]) -> KVRelayError:
    """What to tell a caller when no router had the request: a router that could not say might have had it."""
    errors = {address: error for address, error in outcomes.items() if error is not None}
    for error in errors.values():
        if not isinstance(error, UnknownRequest):
            return error
    if len(errors) == 1:
        return next(iter(errors.values()))
    said = "; ".join(f"{address}: {error.message}" for address, error in errors.items())
    return UnknownRequest(f"no router knows the request ({said})", field="request_id")
