"""KV transfer as nodes use it: asyncio outside, one owner thread inside."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from ipaddress import ip_address
from secrets import token_hex

from kvrelay.core.errors import ConfigError, DuplicateRequest, KVRelayError, Overloaded, TransferFailed
from kvrelay.core.ids import BlockId, TransferId
from kvrelay.core.kv import KVFingerprint, KVStore
from kvrelay.kv_transfer.config import KVTransferConfig
from kvrelay.kv_transfer.interface import (
    ExpectedTransfer,
    PushDone,
    PushFailed,
    PushSpec,
    ReceiveFailed,
    TransferEvent,
    TransferListener,
)
from kvrelay.kv_transfer.kv_range import KVRange
from kvrelay.kv_transfer.local_node import LocalNode
from kvrelay.kv_transfer.owner import TransferOwner, TransferSnapshot
from kvrelay.kv_transfer.reactor import Reactor
from kvrelay.kv_transfer.sockets import HostSockets
from kvrelay.kv_transfer.transport import TransportFactory

_log = logging.getLogger(__name__)


class KVTransferService:
    """A `KVTransfer`. `listener` is called on the event loop that `start` ran on.

    `transport_factory` replaces the configured transport.

    Raises:
        ConfigError: a staging slot can't hold one token of one layer.
    """

    def __init__(
        self,
        node_id: str,
        store: KVStore,
        fingerprint: KVFingerprint,
        config: KVTransferConfig,
        listener: TransferListener,
        *,
        transport_factory: TransportFactory | None = None,
    ) -> None:
        unit_bytes = store.layout.token_bytes_per_layer
        slots = config.slots(store.device_kind)
        if slots.slot_bytes < unit_bytes:
            raise ConfigError(
                f"slot_bytes must be at least {unit_bytes}, the KV of one token in one layer,"
                f" got {slots.slot_bytes}"
            )
        self._config = config
        self._listener = listener
        self._reactor = Reactor(f"kv-transfer-{node_id}")
        node = LocalNode(
            node_id=node_id,
            incarnation=token_hex(8),
            fingerprint=fingerprint,
            store=store,
            config=config,
            slots=slots,
            watcher=self._reactor,
            sockets=HostSockets(),
            clock=time.monotonic,
            emit=self._emit,
        )
        self._owner = TransferOwner(node, transport_factory)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        self._pushes: set[TransferId] = set()
        self._receives: set[TransferId] = set()
        self._silenced: set[TransferId] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """``host:port`` that peers dial; known after `start`."""
        host = self._config.dialled_host
        return f"[{host}]:{self._owner.port}" if ":" in host else f"{host}:{self._owner.port}"

    @property
    def transport_note(self) -> str:
        """The transport in use and why; known after `start`."""
        return self._owner.transport_note

    def snapshot(self) -> TransferSnapshot:
        """What is held now; exact when nothing is under way. Only between `start` and `close`."""
        return self._owner.snapshot()

    def link_bytes_per_s(self) -> dict[str, float]:
        """What each link to a receiver gave when made, by address. Only between `start` and `close`."""
        return self._owner.link_bytes_per_s()

    async def start(self) -> None:
        """Bind, register staging memory, start the owner thread.

        Raises:
            ConfigError: the address is taken, or the transport can't be had.
        """
        self._loop = loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = loop.create_future()

        def on_started(error: BaseException | None) -> None:
            if error is None:
                loop.call_soon_threadsafe(started.set_result, None)
            else:
                loop.call_soon_threadsafe(started.set_exception, error)

        self._reactor.start(self._owner, on_started)
        try:
            await started
        except BaseException:
            if started.done() and started.exception() is not None:
                self._reactor.join()
                self._is_closed = True
            raise

    async def close(self) -> None:
        """End every transfer (each with its event) and free all resources. Again: nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._loop is not None:
            loop = self._loop
            stopped: asyncio.Future[None] = loop.create_future()
            self._reactor.stop(lambda: _tell(loop, stopped))
            await stopped
        self._reactor.join()

    def expect(self, expected: ExpectedTransfer) -> None:
        """See `KVTransfer`. `block_table` must not change until the transfer ends.

        Raises:
            Overloaded: too many transfers are expected already.
            DuplicateRequest: that one is.
        """
        if expected.transfer_id in self._receives:
            raise DuplicateRequest(f"transfer {expected.transfer_id} is expected already")
        if len(self._receives) >= self._config.max_concurrent_transfers:
            raise Overloaded(f"{len(self._receives)} transfers are expected already")
        self._receives.add(expected.transfer_id)
        if not self._reactor.post(partial(self._owner.expect, expected)):
            self._emit(ReceiveFailed(expected.transfer_id, _closed()))

    def open_push(self, spec: PushSpec) -> None:
        """See `KVTransfer`.

        Raises:
            DuplicateRequest: that transfer is under way.
        """
        if spec.transfer_id in self._pushes:
            raise DuplicateRequest(f"transfer {spec.transfer_id} is under way already")
        if len(self._pushes) >= self._config.max_concurrent_transfers:
            error = Overloaded(f"{len(self._pushes)} transfers are under way already")
            self._emit(PushFailed(spec.transfer_id, error))
            return
        self._pushes.add(spec.transfer_id)
        if not self._reactor.post(partial(self._owner.open, spec)):
            self._emit(PushFailed(spec.transfer_id, _closed()))
            return
        self._connect(spec)

    def push_ready(
        self, transfer_id: TransferId, block_table: Sequence[BlockId], layers: range, tokens: range
    ) -> None:
        """See `KVTransfer`. Copies `block_table`."""
        if not layers or not tokens:
            return
        command = partial(self._owner.report, transfer_id, tuple(block_table), KVRange(layers, tokens))
        if not self._reactor.post(command, may_refuse=True):
            self._owner.overflow(transfer_id)

    def finish_push(self, transfer_id: TransferId, output_token_id: int) -> None:
        """See `KVTransfer`."""
        self._reactor.post(partial(self._owner.finish, transfer_id, output_token_id))

    def refuse(self, transfer_id: TransferId) -> None:
        """See `KVTransfer`."""
        assert transfer_id not in self._receives, "an expected transfer is cancelled, not refused"
        self._reactor.post(partial(self._owner.refuse, transfer_id))

    async def cancel(self, transfer_id: TransferId) -> None:
        """See `KVTransfer`."""
        if transfer_id not in self._pushes and transfer_id not in self._receives:
            return
        loop = asyncio.get_running_loop()
        cancelled: asyncio.Future[None] = loop.create_future()

        # An event of this transfer may be on its way to the loop already.
        self._silenced.add(transfer_id)
        try:
            if self._reactor.post(partial(self._owner.cancel, transfer_id, lambda: _tell(loop, cancelled))):
                await asyncio.shield(cancelled)
        finally:
            self._silenced.discard(transfer_id)
            self._pushes.discard(transfer_id)
            self._receives.discard(transfer_id)

    def _emit(self, event: TransferEvent) -> None:
        """From any thread."""
        assert self._loop is not None, "start() comes first"
        try:
            self._loop.call_soon_threadsafe(self._deliver, event)
        except RuntimeError:
            _log.warning("the event loop was closed before the KV transfer service: %s is lost", event)

    def _deliver(self, event: TransferEvent) -> None:
        is_push = isinstance(event, PushDone | PushFailed)
        (self._pushes if is_push else self._receives).discard(event.transfer_id)
        if event.transfer_id not in self._silenced:
            self._listener(event)

    def _connect(self, spec: PushSpec) -> None:
        try:
            host, port = _split_address(spec.peer_address)
        except TransferFailed as error:
            self._fail_push(spec, error)
            return
        if _is_ip(host):
            self._reactor.post(partial(self._owner.connect, spec, host, port))
        else:
            self._spawn(self._resolve_and_connect(spec, host, port))

    async def _resolve_and_connect(self, spec: PushSpec, host: str, port: int) -> None:
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError) as error:
            self._fail_push(spec, TransferFailed(f"can't resolve {host}: {error}"))
            return
        resolved = str(found[0][4][0])
        self._reactor.post(partial(self._owner.connect, spec, resolved, port))

    def _fail_push(self, spec: PushSpec, error: KVRelayError) -> None:
        self._reactor.post(partial(self._owner.fail_push, spec.transfer_id, error))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        assert self._loop is not None, "start() comes first"
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _closed() -> TransferFailed:
    return TransferFailed("this node's KV transfer is closed")


def _tell(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    """From another thread: resolve the future."""
    loop.call_soon_threadsafe(_resolve, future)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise TransferFailed(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)
