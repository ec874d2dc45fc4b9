"""All routers a client may use: connects to the first that answers, and repeats what failed in passing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import TypeVar

import grpc

from kvrelay.client.addresses import RouterRotation
from kvrelay.client.config import ClientConfig
from kvrelay.client.request_progress import retry_pause_s
from kvrelay.client.router_link import RouterLink
from kvrelay.codec.errors import from_rpc_error
from kvrelay.core.errors import InvalidRequest, KVRelayError, RequestCancelled, RouterUnavailable

T = TypeVar("T")


class RouterSet:
    """One link per address. Used on one event loop."""

    def __init__(
        self, addresses: tuple[str, ...], config: ClientConfig, rng: Random, now_s: Callable[[], float]
    ) -> None:
        self.addresses = addresses
        self._config = config
        self._rng = rng
        self._now_s = now_s
        self._rotation = RouterRotation(addresses, rng, config.backoff_base_s, config.backoff_max_s)
        self._links = {address: RouterLink(address, config, now_s) for address in addresses}
        self._is_closed = False

    async def connect(self, *, last: str = "") -> RouterLink:
        """A connected link, of another router than `last` if one can be had.

        Raises:
            RouterUnavailable: no router answers; names all of them and why.
            RequestCancelled: the client is closed.
        """
        faults: list[str] = []
        for address in self._rotation.order(self._now_s(), last=last):
            self._check_open()
            try:
                await self._links[address].connect()
            except RouterUnavailable as error:
                self.mark_failed(address)
                faults.append(f"{address} ({error.message})")
            else:
                self._check_open()
                return self._links[address]
        raise RouterUnavailable(f"no router answers: {'; '.join(faults)}")

    def mark_failed(self, address: str) -> None:
        """Prefer others for a while."""
        self._rotation.mark_failed(address, self._now_s())

    def mark_well(self, address: str) -> None:
        """It has just served something."""
        self._rotation.mark_well(address)

    async def call(self, rpc: Callable[[RouterLink], Awaitable[T]]) -> T:
        """The outcome of a call that may safely be repeated, from any router.

        Raises:
            KVRelayError: a router refused it, or it failed too often.
        """
        last, num_failures = "", 0
        while True:
            try:
                link = await self.connect(last=last)
                last = link.address
                return await self.call_on(link, rpc)
            except KVRelayError as error:
                num_failures += 1
                if not error.retryable or num_failures > self._config.max_retries:
                    raise
                await asyncio.sleep(retry_pause_s(num_failures - 1, error, self._config, self._rng))

    async def call_each(self, rpc: Callable[[RouterLink], Awaitable[None]]) -> dict[str, KVRelayError | None]:
        """The outcome on every router, one try each."""

        async def one(address: str) -> KVRelayError | None:
            link = self._links[address]
            try:
                await link.connect()
            except RouterUnavailable as error:
                return RouterUnavailable(f"no router answers: {address} ({error.message})")
            try:
                return await self.call_on(link, rpc)
            except KVRelayError as error:
                return error

        self._check_open()
        outcomes = await asyncio.gather(*(one(address) for address in self.addresses))
        return dict(zip(self.addresses, outcomes, strict=True))

    async def call_at(self, address: str, rpc: Callable[[RouterLink], Awaitable[T]]) -> T:
        """One try on the router at that address.

        Raises:
            KVRelayError: as `call_on`; RouterUnavailable: it does not answer.
        """
        link = self._links[address]
        await link.connect()
        return await self.call_on(link, rpc)

    async def call_on(self, link: RouterLink, rpc: Callable[[RouterLink], Awaitable[T]]) -> T:
        """One try on one router.

        Raises:
            KVRelayError: what the router said, or what became of the call.
        """
        try:
            answer = await rpc(link)
        except grpc.aio.AioRpcError as error:
            raise self.fault_of(link, error) from error
        self.mark_well(link.address)
        return answer

    def fault_of(self, link: RouterLink, error: grpc.aio.AioRpcError) -> KVRelayError:
        """What a failed call means; a router that is gone is asked last for a while."""
        cause = from_rpc_error(error)
        if not isinstance(cause, RouterUnavailable):
            return cause
        self.mark_failed(link.address)
        return RouterUnavailable(
            f"router {link.address} was lost: {cause.message}", retry_after_s=cause.retry_after_s
        )

    async def close(self) -> None:
        """Close every link; calls in flight are cancelled."""
        self._is_closed = True
        for link in self._links.values():
            await link.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RequestCancelled("the client was closed")


def unreadable(address: str, error: InvalidRequest) -> RouterUnavailable:
    """A router's answer that could not be decoded is the router's fault, not the caller's."""
    return RouterUnavailable(f"router {address} sent what can't be read: {error.message}")
