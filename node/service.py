"""A node's shell: feeds the core with what happens, and performs what it decides."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Final

from kvrelay.core.clock import Clock
from kvrelay.core.ids import NodeId, TransferId
from kvrelay.core.kv import KVFingerprint, KVStore
from kvrelay.core.kv_events import KVChanges
from kvrelay.core.node_messages import NodeLoad, RouterFrame, Welcome
from kvrelay.engine.interface import Engine, EngineLoad, KVReady
from kvrelay.kv_transfer.config import KVTransferConfig
from kvrelay.kv_transfer.interface import TransferEvent, TransferListener
from kvrelay.node.config import NodeConfig
from kvrelay.node.core import NodeCore
from kvrelay.node.description import ObservableTransfer, default_node_id, describe_node, node_load
from kvrelay.node.engine_thread import EngineThread
from kvrelay.node.events import (
    BeginDrain,
    CloseRouter,
    DrainRequested,
    DrainTimedOut,
    EngineDied,
    EngineEvent,
    NodeEffect,
    NodeEvent,
    RouterConnected,
    RouterFrameReceived,
    RouterStreamLost,
    SendFrame,
    TellKVSnapshot,
    Ticked,
    TransferCommand,
)
from kvrelay.node.kv_feed import KVFeed
from kvrelay.node.router_link import RouterLink
from kvrelay.node.transfer_commands import TransferCommands

logger = logging.getLogger(__name__)

TICK_S: Final = 0.2
HAND_BACK_TIMEOUT_S: Final = 5.0
"""After a drain's time is over: how long the engine and the peers may take to let go."""
ENGINE_STOP_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 20.0
"""More than all that follows a drain takes: handing back, leaving the routers, stopping the engine."""


TransferFactory = Callable[
    [str, KVStore, KVFingerprint, KVTransferConfig, TransferListener], ObservableTransfer
]
"""Makes a node's KV transfer; the arguments are those of `KVTransferService`."""


class NodeService:
    """One running node. Create and use it on the event loop.

    `attached` is set once a router has welcomed it, `idle` while it holds nothing for any attempt,
    `drain_asked` when a router says that it is to leave; `failed` is done when the node can't go on, with the
    reason.
    """

    def __init__(
        self,
        config: NodeConfig,
        core: NodeCore,
        engine: Engine,
        make_transfer: TransferFactory,
        *,
        clock: Clock,
        tokenizer: bytes | None = None,
        rng: Random | None = None,
    ) -> None:
        self.node_id = NodeId(config.node_id or default_node_id(config.role))
        self.attached = asyncio.Event()
        self.drain_asked = asyncio.Event()
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._config = config
        self._core = core
        self._engine = engine
        self._clock = clock
        self._tokenizer = tokenizer
        self._rng = rng if rng is not None else Random(secrets.randbits(64))
        self._transfer = make_transfer(
            self.node_id, engine.kv, engine.info.fingerprint, config.transfer, self._on_transfer_event
        )
        self._engine_thread = EngineThread(
            engine,
            clock,
            deliver=self._on_engine_events,
            push_ready=self._push_ready,
            max_attempts=config.max_attempts_in_flight,
        )
        self._engine_load: EngineLoad = engine.load()
        self._kv_feed = KVFeed(config.max_buffered_kv_keys)
        self._links: list[RouterLink] = []
        self._link_of_epoch: dict[int, RouterLink] = {}
        self._events: deque[NodeEvent] = deque()
        self._is_dispatching = False
        self._transfers = TransferCommands(
            self._transfer, engine.kv.layout.num_layers, self._dispatch, self.on_crash
        )
        self.idle = asyncio.Event()
        self.idle.set()
        self._ticker: asyncio.Task[None] | None = None

    @property
    def transfer_address(self) -> str:
        """Where other nodes send KV to, ``host:port``; known after `start`."""
        return self._transfer.address

    def stuck_for_s(self) -> float:
        """How long the engine's thread has stood still in one turn; 0 while it waits for work."""
        return self._engine_thread.stuck_for_s()

    def describe(self) -> str:
        """What the node does, in a few words."""
        num_attached, num_routers = len(self._link_of_epoch), len(self._links)
        if not self.attached.is_set():
            return f"waiting for a router: {', '.join(self._config.routers)}"
        state = "draining" if self._core.is_draining else "serving"
        return f"{state}: {self._core.num_attempts} attempts, {num_attached} of {num_routers} routers"

    # ---- life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Serve: start the engine's thread and KV transfer, and dial all routers."""
        await self._transfer.start()
        logger.info(
            "KV transfer address=%s transport=%s", self._transfer.address, self._transfer.transport_note
        )
        self._engine_thread.start(asyncio.get_running_loop())
        await self._engine_thread.prepared.wait()
        description = describe_node(
            self._config.role, self.node_id, self._engine.info, self._transfer, self._tokenizer
        )
        for address in self._config.routers:
            link = RouterLink(
                address,
                self._config,
                description,
                self._tokenizer,
                self._kv_feed,
                self,
                self._clock,
                self._rng,
            )
            self._links.append(link)
            link.start()
        self._ticker = asyncio.create_task(self._tick())

    async def drain(self) -> None:
        """Take nothing new, and return when nothing is held any more: finished, or handed back when
        `drain_timeout_s` is over."""
        logger.info("draining node=%s attempts=%d", self.node_id, self._core.num_attempts)
        self._dispatch(DrainRequested())
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                await self.idle.wait()
        except TimeoutError:
            logger.warning("drain timed out, handing back attempts=%d", self._core.num_attempts)
            self._dispatch(DrainTimedOut())
            try:
                async with asyncio.timeout(HAND_BACK_TIMEOUT_S):
                    await self.idle.wait()
            except TimeoutError:
                logger.error("leaving with attempts=%d still held", self._core.num_attempts)

    async def close(self, *, at_once: bool = False) -> None:
        """Leave the routers (telling them what waits to be told, unless `at_once`) and free everything."""
        if self._ticker is not None:
            self._ticker.cancel()
        await asyncio.gather(*[link.leave(at_once=at_once) for link in self._links])
        await self._transfers.wait_cancelled(HAND_BACK_TIMEOUT_S)
        await self._transfer.close()
        if not await asyncio.to_thread(self._engine_thread.stop, ENGINE_STOP_TIMEOUT_S):
            logger.error("the engine's step did not end within %g s", ENGINE_STOP_TIMEOUT_S)
        await asyncio.sleep(0)  # what the engine posted last is delivered before the loop closes

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._dispatch(Ticked())

    # ---- what links say (LinkOwner) ----------------------------------------------------------------

    def on_welcome(self, link: RouterLink, welcome: Welcome) -> None:
        """A link is attached."""
        other = self._link_of_epoch.get(welcome.router_epoch)
        if other is not None and other is not link:
            logger.warning("router=%s and router=%s are the same router", other.address, link.address)
        self._link_of_epoch[welcome.router_epoch] = link
        self._dispatch(RouterConnected(welcome))
        self.attached.set()

    def on_router_frame(self, router_epoch: int, frame: RouterFrame) -> None:
        """A router has commands, or is alive."""
        self._dispatch(RouterFrameReceived(router_epoch, frame.commands))

    def on_stream_lost(self, link: RouterLink, router_epoch: int) -> None:
        """A link's stream has ended."""
        if self._link_of_epoch.get(router_epoch) is link:
            del self._link_of_epoch[router_epoch]
            self._dispatch(RouterStreamLost(router_epoch))

    def current_load(self) -> NodeLoad:
        """What the engine said last, and what the core and KV transfer hold now."""
        return node_load(self._engine_load, self._core.num_attempts, self._transfer.snapshot())

    def on_crash(self, error: BaseException) -> None:
        """A bug: the process is to end."""
        if not self.failed.done():
            logger.critical("node failed", exc_info=error)
            self.failed.set_result(f"{type(error).__name__}: {error}")

    # ---- what engine and transfer say --------------------------------------------------------------

    def _on_engine_events(
        self, events: Sequence[EngineEvent], load: EngineLoad | None, kv_changes: KVChanges | None
    ) -> None:
        if load is not None:
            self._engine_load = load
        for event in events:
            self._dispatch(event)
            if isinstance(event, EngineDied) and not self.failed.done():
                self.failed.set_result(event.message)
        if kv_changes is not None:  # after the tokens: of a long prompt they take a millisecond
            self._kv_feed.record(kv_changes)
            for link in self._links:
                link.kv_changed()
        if load is not None:
            self._tell_load()

    def _on_transfer_event(self, event: TransferEvent) -> None:
        self._dispatch(event)

    def _push_ready(self, transfer_id: TransferId, ready: KVReady) -> None:
        """In the engine's thread."""
        self._transfer.push_ready(transfer_id, ready.block_table, ready.layers, ready.tokens)

    def _tell_load(self) -> None:
        for link in self._links:
            link.load_changed()

    # ---- the core ----------------------------------------------------------------------------------

    def _dispatch(self, event: NodeEvent) -> None:
        """Tell the core, and perform what it answers; events that this causes come after it."""
        self._events.append(event)
        if self._is_dispatching:
            return
        self._is_dispatching = True
        num_attempts = self._core.num_attempts
        try:
            while self._events:
                for effect in self._core.handle(self._events.popleft(), self._clock.now_s()):
                    self._perform(effect)
        except Exception as error:  # the shell's outermost loop: a bug ends the process
            self.on_crash(error)
        finally:
            self._is_dispatching = False
        if self._core.num_attempts != num_attempts:
            self._on_num_attempts_changed()

    def _on_num_attempts_changed(self) -> None:
        if self._core.num_attempts:
            self.idle.clear()
        else:
            self.idle.set()
        self._tell_load()

    def _perform(self, effect: NodeEffect) -> None:
        if isinstance(effect, TransferCommand):
            self._transfers.perform(effect)
            return
        match effect:
            case SendFrame(router_epoch, tokens, reports):
                if (link := self._link_of_epoch.get(router_epoch)) is not None:
                    link.send(tokens, reports)
            case CloseRouter(router_epoch, reason):
                if (link := self._link_of_epoch.get(router_epoch)) is not None:
                    link.close_stream(reason)
            case TellKVSnapshot(router_epoch):
                if (link := self._link_of_epoch.get(router_epoch)) is not None:
                    link.send_kv_snapshot()
            case BeginDrain():
                self.drain_asked.set()
            case _:
                self._engine_thread.send(effect)
