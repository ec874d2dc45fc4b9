"""A simulated node's transfer thread: the real `TransferOwner`, turned by a reactor on virtual time."""

from __future__ import annotations

import selectors
import socket
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, cast

from kvrelay.core.errors import KVRelayError, Overloaded
from kvrelay.core.ids import BlockId, TransferId
from kvrelay.core.kv import KVFingerprint, KVStore
from kvrelay.kv_transfer.config import KVTransferConfig
from kvrelay.kv_transfer.interface import (
    ExpectedTransfer,
    PushDone,
    PushFailed,
    PushSpec,
    TransferEvent,
    TransferListener,
)
from kvrelay.kv_transfer.kv_range import KVRange
from kvrelay.kv_transfer.local_node import LocalNode
from kvrelay.kv_transfer.owner import TransferOwner
from kvrelay.kv_transfer.transport import TransportFactory
from kvrelay.node.transfer_commands import NO_TOKEN
from kvrelay.simulator.faults.network import Network
from kvrelay.simulator.faults.process import Lane, Process, Timer
from kvrelay.simulator.faults.sockets import PORT, SimSocket, SimSockets

_POLL_S: Final = 0.0005
MAX_TURNS: Final = 8
"""In one step."""


class TransferThread:
    """Runs commands and turns, and is the `Watcher` of its sockets: what `Reactor` does."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._inbox: deque[Callable[[], None]] = deque()
        self._lane = Lane(process)
        self._watched: dict[SimSocket, tuple[int, Callable[[int], None]]] = {}
        self._ready: dict[SimSocket, None] = {}
        self._wake_timer = Timer(process, self._turn)
        self.owner: TransferOwner
        self.has_changed = True
        """Whether it has done anything since this was set to False."""

    def post(self, command: Callable[[], None]) -> None:
        """Have the thread run it."""

        def arrive() -> None:
            self._inbox.append(command)
            self.wake()

        self._lane.post(arrive)

    def wake(self) -> None:
        """Something has happened: a turn is due."""
        self._wake_timer.set_sooner(0.0)

    def watch(self, sock: socket.socket, events: int, callback: Callable[[int], None]) -> None:
        """See `Watcher`."""
        sim_socket = cast("SimSocket", sock)
        self._watched[sim_socket] = (events, callback)
        self.notify(sim_socket, 0)

    def unwatch(self, sock: socket.socket) -> None:
        """See `Watcher`."""
        self._watched.pop(cast("SimSocket", sock), None)
        self._ready.pop(cast("SimSocket", sock), None)

    def notify(self, sock: SimSocket, _events: int) -> None:
        """It may be ready."""
        if sock in self._watched and self._mask(sock):
            self._ready[sock] = None
            self.wake()

    def _mask(self, sock: SimSocket) -> int:
        wanted = self._watched[sock][0]
        is_readable, is_writable = sock.is_readable, sock.is_writable
        mask = (selectors.EVENT_READ if is_readable else 0) | (selectors.EVENT_WRITE if is_writable else 0)
        return mask & wanted

    def _turn(self) -> None:
        self.has_changed = True
        now_s = self._process.now_s()
        is_busy, num_turns = True, 0
        while is_busy and num_turns < MAX_TURNS:
            num_turns += 1
            is_busy = self._turn_once(now_s)
        if is_busy:
            self._wake_timer.set_sooner(0.00002)
        elif self.owner.is_polling(now_s):
            self._wake_timer.set_sooner(_POLL_S)
        elif (wait_s := self.owner.wait_s(now_s)) is not None:
            self._wake_timer.set_sooner(max(wait_s, 0.00001))

    def _turn_once(self, now_s: float) -> bool:
        """Whether there may be more to do at once."""
        num_commands = len(self._inbox)
        for _ in range(num_commands):
            self._inbox.popleft()()
        is_busy = self.owner.turn(now_s) or num_commands > 0
        ready, self._ready = self._ready, {}
        for sock in ready:
            if sock in self._watched and (mask := self._mask(sock)):
                self._watched[sock][1](mask)
        for sock in ready:
            self.notify(sock, 0)
        return is_busy or bool(ready)


class SimTransfers:
    """What `KVTransferService` does between a node's loop and the transfer thread."""

    def __init__(
        self,
        process: Process,
        network: Network,
        store: KVStore,
        fingerprint: KVFingerprint,
        config: KVTransferConfig,
        listener: TransferListener,
        make_transport: Callable[[TransferThread], TransportFactory],
    ) -> None:
        self.thread = TransferThread(process)
        self._process = process
        self._config = config
        self._num_layers = store.layout.num_layers
        self._listener = listener
        self._to_loop = Lane(process)
        self._pushes: set[TransferId] = set()
        self._receives: set[TransferId] = set()
        self._silenced: set[TransferId] = set()
        node = LocalNode(
            node_id=process.name,
            incarnation=f"{process.life}",
            fingerprint=fingerprint,
            store=store,
            config=config,
            slots=config.slots(store.device_kind),
            watcher=self.thread,
            sockets=SimSockets(process, network, self.thread.notify, _virtual_address),
            clock=process.now_s,
            emit=self._emit,
        )
        self.owner = TransferOwner(node, make_transport(self.thread))
        self.thread.owner = self.owner
        self.owner.begin()

    @property
    def num_open(self) -> tuple[int, int]:
        """Pushes and receives that have not ended, as the loop knows it."""
        return len(self._pushes), len(self._receives)

    @property
    def open_ids(self) -> set[TransferId]:
        """Those of `num_open`."""
        return self._pushes | self._receives

    def expect(self, expected: ExpectedTransfer) -> None:
        """See `KVTransfer`."""
        if len(self._receives) >= self._config.max_concurrent_transfers:
            raise Overloaded(f"{len(self._receives)} transfers are expected already")
        self._receives.add(expected.transfer_id)
        self.thread.post(partial(self.owner.expect, expected))

    def open_push(self, spec: PushSpec) -> None:
        """See `KVTransfer`."""
        if len(self._pushes) >= self._config.max_concurrent_transfers:
            error: KVRelayError = Overloaded(f"{len(self._pushes)} transfers are under way already")
            self._emit(PushFailed(spec.transfer_id, error))
            return
        self._pushes.add(spec.transfer_id)
        self.thread.post(partial(self.owner.open, spec))
        self.thread.post(partial(self.owner.connect, spec, spec.peer_address.partition(":")[0], PORT))

    def push_ready(
        self, transfer_id: TransferId, block_table: Sequence[BlockId], layers: range, tokens: range
    ) -> None:
        """See `KVTransfer`."""
        if layers and tokens:
            part = KVRange(layers, tokens)
            self.thread.post(partial(self.owner.report, transfer_id, tuple(block_table), part))

    def push_prefix(self, transfer_id: TransferId, block_table: Sequence[BlockId], num_tokens: int) -> None:
        """All layers of so many tokens, and that is all of it."""
        self.push_ready(transfer_id, block_table, range(self._num_layers), range(num_tokens))
        self.finish_push(transfer_id, NO_TOKEN)

    def finish_push(self, transfer_id: TransferId, output_token_id: int) -> None:
        """See `KVTransfer`."""
        self.thread.post(partial(self.owner.finish, transfer_id, output_token_id))

    def refuse(self, transfer_id: TransferId) -> None:
        """See `KVTransfer`."""
        self.thread.post(partial(self.owner.refuse, transfer_id))

    def cancel(self, transfer_id: TransferId, on_cancelled: Callable[[], None]) -> None:
        """See `KVTransfer`; `on_cancelled` is called later."""
        if transfer_id not in self._pushes and transfer_id not in self._receives:
            self._process.after(0.0, on_cancelled)
            return
        self._silenced.add(transfer_id)

        def told() -> None:
            self._silenced.discard(transfer_id)
            self._pushes.discard(transfer_id)
            self._receives.discard(transfer_id)
            on_cancelled()

        self.thread.post(partial(self.owner.cancel, transfer_id, lambda: self._to_loop.post(told)))

    def _emit(self, event: TransferEvent) -> None:
        self._to_loop.post(partial(self._deliver, event))

    def _deliver(self, event: TransferEvent) -> None:
        is_push = isinstance(event, PushDone | PushFailed)
        (self._pushes if is_push else self._receives).discard(event.transfer_id)
        if event.transfer_id not in self._silenced:
            self._listener(event)


def _virtual_address(host: str) -> str:
    return f"{host}:kv"
