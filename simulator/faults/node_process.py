"""A prefill or decode node: its own core, engine, feed and KV transfer, in a shell on virtual time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from kvrelay.core.errors import KVRelayError
from kvrelay.core.ids import NodeId, TransferId
from kvrelay.core.kv_events import KVChanges
from kvrelay.core.node_messages import Command, NodeDescription, NodeLoad, Role, RouterFrame, Welcome
from kvrelay.decode_node.core import DecodeNodeCore
from kvrelay.engine.interface import EngineLoad, KVReady
from kvrelay.kv_transfer.interface import PushFailed, ReceiveFailed, TransferEvent
from kvrelay.kv_transfer.transport import KVTransport, TransportContext, TransportFactory
from kvrelay.node.config import NodeConfig
from kvrelay.node.core import NodeCore, NodeCoreConfig
from kvrelay.node.description import node_load
from kvrelay.node.events import (
    BeginDrain,
    CancelTransfer,
    CloseRouter,
    DrainRequested,
    DrainTimedOut,
    EngineEvent,
    ExpectTransfer,
    FinishPush,
    NodeEffect,
    NodeEvent,
    OpenPush,
    PushPrefix,
    RefuseTransfer,
    RouterConnected,
    RouterFrameReceived,
    RouterStreamLost,
    SendFrame,
    TellKVSnapshot,
    Ticked,
    TransferCancelled,
)
from kvrelay.node.kv_feed import KVFeed
from kvrelay.node.service import TICK_S
from kvrelay.prefill_node.core import PrefillNodeCore
from kvrelay.simulator.faults.engine_worker import EngineWorker
from kvrelay.simulator.faults.network import Network
from kvrelay.simulator.faults.node_stream import NodeStream
from kvrelay.simulator.faults.process import Process
from kvrelay.simulator.faults.transfer_thread import SimTransfers, TransferThread
from kvrelay.simulator.faults.transport import Fabric, SimTransport
from kvrelay.simulator.faults.world import World

CORES: Final[dict[Role, type[NodeCore]]] = {Role.PREFILL: PrefillNodeCore, Role.DECODE: DecodeNodeCore}
HAND_BACK_S: Final = 2.0


class SimNode:
    """Does what `NodeService` does. `worker`, `core` and `transfers` are those of its present life."""

    def __init__(
        self, world: World, network: Network, fabric: Fabric, config: NodeConfig, routers: Sequence[str]
    ) -> None:
        self.process = Process(world, config.node_id)
        self.config = config
        self.role = config.role
        self.is_leaving = False
        self.slowness = 1.0
        self.has_changed = True
        """Whether its core was told anything since this was set to False."""
        self.core: NodeCore
        self.worker: EngineWorker
        self.transfers: SimTransfers
        self.kv_feed: KVFeed
        self.on_command: Callable[[SimNode, int, Command], None] = _ignore
        self.heard_s: dict[int, float] = {}
        """By router epoch: when it was last heard of, on the world's clock."""
        self._world = world
        self._network = network
        self._fabric = fabric
        self._routers = routers
        self._streams: list[NodeStream] = []
        self._stream_of_epoch: dict[int, NodeStream] = {}
        self._events: deque[NodeEvent] = deque()
        self._is_dispatching = False
        self._engine_load = EngineLoad()

    @property
    def name(self) -> str:
        return self.process.name

    def start(self) -> None:
        """Begin a life."""
        process = self.process
        process.start()
        self._world.say(self.name, "starts")
        self.is_leaving = False
        self.slowness = 1.0
        self._stream_of_epoch.clear()
        self.heard_s.clear()
        self._events.clear()
        self.kv_feed = KVFeed(self.config.max_buffered_kv_keys)
        self.worker = EngineWorker(
            process, self.config.engine, deliver=self._on_engine_events, push_ready=self._push_ready
        )
        engine = self.worker.engine
        self._engine_load = engine.load()
        self.core = CORES[self.role](
            NodeCoreConfig(
                self.config.max_attempts_in_flight,
                engine.info.fingerprint.digest,
                self.config.pull_timeout_s,
            )
        )
        self.transfers = SimTransfers(
            process,
            self._network,
            engine.kv,
            engine.info.fingerprint,
            self.config.transfer,
            self._on_transfer_event,
            self._transport_factory,
        )
        description = self._describe()
        self._streams = [
            NodeStream(process, self._network, address, self.config, description, self.kv_feed, self)
            for address in self._routers
        ]
        for stream in self._streams:
            stream.dial()
        process.after(TICK_S, self._tick)

    def _transport_factory(self, thread: TransferThread) -> TransportFactory:
        def make(context: TransportContext) -> KVTransport:
            transport = SimTransport(context, self.process, self._network, self._fabric, thread.wake)
            transport.holder_of = lambda offset: thread.owner.holder_of(offset)
            return transport

        return make

    def _describe(self) -> NodeDescription:
        info = self.worker.engine.info
        return NodeDescription(
            node_id=NodeId(self.name),
            incarnation=self._world.rng.getrandbits(63),
            role=self.role,
            model=info.model,
            engine=info.engine,
            fingerprint=info.fingerprint,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            max_num_seqs=info.max_num_seqs,
            eos_token_ids=info.eos_token_ids,
            transfer_address=f"{self.name}:kv",
            transport="memory",
        )

    def slow_down(self, slowness: float) -> None:
        """Its steps take so many times as long from now on."""
        self.slowness = self.worker.slowness = slowness

    # ---- life --------------------------------------------------------------------------------------

    def terminate(self) -> None:
        """SIGTERM: take nothing new, and leave when nothing is held, or it takes too long."""
        self.is_leaving = True
        self._world.say(self.name, "drains")
        self._dispatch(DrainRequested())
        self.process.after(self.config.drain_timeout_s, self._end_drain)
        self._leave_if_idle()

    def _end_drain(self) -> None:
        self._world.say(self.name, "hands back what is left")
        self._dispatch(DrainTimedOut())
        self.process.after(HAND_BACK_S, self._leave)

    def _leave_if_idle(self) -> None:
        if self.is_leaving and not self.core.num_attempts:
            self.process.after(0.0, self._leave)

    def _leave(self) -> None:
        self._world.say(self.name, "leaves")
        for stream in self._streams:
            stream.leave()
        self.transfers.owner.end()
        for end in self._network.ends_of(self.process):
            end.close()
        self.process.kill()

    def _tick(self) -> None:
        self._dispatch(Ticked())
        self.process.after(TICK_S, self._tick)

    # ---- what streams say --------------------------------------------------------------------------

    def on_welcome(self, stream: NodeStream, welcome: Welcome) -> None:
        """A stream is attached."""
        self.heard_s[welcome.router_epoch] = self._world.now_s
        self._stream_of_epoch[welcome.router_epoch] = stream
        self._dispatch(RouterConnected(welcome))

    def on_router_frame(self, router_epoch: int, frame: RouterFrame) -> None:
        """A router has commands, or is alive."""
        self.heard_s[router_epoch] = self._world.now_s
        for command in frame.commands:
            self.on_command(self, router_epoch, command)
        self._dispatch(RouterFrameReceived(router_epoch, frame.commands))

    def on_stream_lost(self, stream: NodeStream, router_epoch: int) -> None:
        """A stream has ended."""
        if self._stream_of_epoch.get(router_epoch) is stream:
            del self._stream_of_epoch[router_epoch]
            self._dispatch(RouterStreamLost(router_epoch))

    def current_load(self) -> NodeLoad:
        """What the engine said last, and what the core and KV transfer hold now."""
        return node_load(self._engine_load, self.core.num_attempts, self.transfers.owner.snapshot())

    # ---- what engine and transfer say --------------------------------------------------------------

    def _on_engine_events(
        self, events: Sequence[EngineEvent], load: EngineLoad | None, kv_changes: KVChanges | None
    ) -> None:
        if load is not None:
            self._engine_load = load
        if kv_changes is not None:
            self.kv_feed.record(kv_changes)
            for stream in self._streams:
                stream.kv_changed()
        for event in events:
            self._dispatch(event)
        if load is not None:
            self._tell_load()

    def _on_transfer_event(self, event: TransferEvent) -> None:
        if self._world.is_traced:
            self._world.say(self.name, f"transfer: {type(event).__name__} {event.transfer_id.attempt}")
        self._dispatch(event)

    def _push_ready(self, transfer_id: TransferId, ready: KVReady) -> None:
        self.transfers.push_ready(transfer_id, ready.block_table, ready.layers, ready.tokens)

    def _tell_load(self) -> None:
        for stream in self._streams:
            stream.load_changed()

    # ---- the core ----------------------------------------------------------------------------------

    def _dispatch(self, event: NodeEvent) -> None:
        self._events.append(event)
        if self._is_dispatching:
            return
        self._is_dispatching = self.has_changed = True
        num_attempts = self.core.num_attempts
        while self._events:
            for effect in self.core.handle(self._events.popleft(), self.process.now_s()):
                self._perform(effect)
        self._is_dispatching = False
        if self.core.num_attempts != num_attempts:
            self._leave_if_idle()
            self._tell_load()

    def _perform(self, effect: NodeEffect) -> None:
        match effect:
            case SendFrame(router_epoch, tokens, reports):
                if (stream := self._stream_of_epoch.get(router_epoch)) is not None:
                    stream.send(tokens, reports)
            case CloseRouter(router_epoch, reason):
                if (stream := self._stream_of_epoch.get(router_epoch)) is not None:
                    stream.close_stream(reason)
            case TellKVSnapshot(router_epoch):
                if (stream := self._stream_of_epoch.get(router_epoch)) is not None:
                    stream.send_kv_snapshot()
            case BeginDrain():
                self.terminate()
            case OpenPush(spec):
                try:
                    self.transfers.open_push(spec)
                except KVRelayError as error:
                    self._events.append(PushFailed(spec.transfer_id, error))
            case ExpectTransfer(expected):
                try:
                    self.transfers.expect(expected)
                except KVRelayError as error:
                    self._events.append(ReceiveFailed(expected.transfer_id, error))
            case PushPrefix(transfer_id, block_table, num_tokens):
                self.transfers.push_prefix(transfer_id, block_table, num_tokens)
            case FinishPush(transfer_id, output_token_id):
                self.transfers.finish_push(transfer_id, output_token_id)
            case RefuseTransfer(transfer_id):
                self.transfers.refuse(transfer_id)
            case CancelTransfer(transfer_id):
                self.transfers.cancel(transfer_id, lambda: self._dispatch(TransferCancelled(transfer_id)))
            case _:
                self.worker.send(effect)


def _ignore(_node: SimNode, _router_epoch: int, _command: Command) -> None:
    return
