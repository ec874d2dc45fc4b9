"""A router: its own shell and core, with streams of the virtual network in place of gRPC."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from kvrelay.codec.cluster import TokenBatchDecoder
from kvrelay.core.client_types import SessionAsk
from kvrelay.core.errors import KVRelayError, UnknownRequest
from kvrelay.core.node_messages import NodeDescription, NodeFrame, Welcome
from kvrelay.router.attachments import Attachment
from kvrelay.router.core import RouterCore
from kvrelay.router.kv_intake import KVIntake
from kvrelay.router.metrics import RouterMetrics
from kvrelay.router.placement import PlacementPolicy
from kvrelay.router.policies import make_policy
from kvrelay.router.prefix_source import IndexedPrefixes
from kvrelay.router.server_config import RouterConfig
from kvrelay.router.sessions import ClientSession
from kvrelay.router.shell import OFTEN_TICK_S, RARE_TICK_S, RouterShell
from kvrelay.simulator.faults.eager_pulls import EagerPulls
from kvrelay.simulator.faults.network import End, Network
from kvrelay.simulator.faults.process import Process
from kvrelay.simulator.faults.world import World

KEEPALIVE_S: Final = 4.0
"""A client that is silent for longer is gone, as gRPC's keep-alive would find."""
PING: Final = "ping"


@dataclass(frozen=True, slots=True)
class CancelById:
    """The RPC `Cancel`."""

    request_id: str


class SimRouter:
    """Listens at `node_address` and `client_address`. Each life has another epoch."""

    def __init__(
        self, world: World, network: Network, name: str, config: RouterConfig, *, pulls_eagerly: bool
    ) -> None:
        self.process = Process(world, name)
        self._pulls_eagerly = pulls_eagerly
        self.node_address, self.client_address = f"{name}:1", f"{name}:2"
        self.config = config
        self.metrics = RouterMetrics()
        self.has_changed = True
        """Whether its core may have been told anything since this was set to False."""
        self.shell: RouterShell
        self.core: RouterCore
        self._world = world
        self._network = network
        self._node_streams: dict[int, _NodeStream] = {}
        self._client_streams: dict[int, _ClientStream] = {}
        self._num_streams = 0
        self._leaves_at_s: float | None = None

    def start(self) -> None:
        """Begin a life."""
        process, rng = self.process, self._world.rng
        process.start()
        epoch = rng.randrange(1, 2**62)
        config, kv = self.config.core, KVIntake(self.config.core)
        self.core = RouterCore(config, epoch, self._make_policy(kv), Random(rng.getrandbits(64)), kv)
        self.shell = RouterShell(self.config, self.core, process, self.metrics)
        self._node_streams.clear()
        self._client_streams.clear()
        self._leaves_at_s = None
        self._network.listen(self.node_address, process, self._on_node)
        self._network.listen(self.client_address, process, self._on_client)
        self._world.say(process.name, f"starts, epoch {epoch:x}")
        self._tick()

    def _make_policy(self, kv: KVIntake) -> PlacementPolicy:
        policy = make_policy(self.config.core.placement, kv.index)
        return EagerPulls(policy, IndexedPrefixes(kv.index)) if self._pulls_eagerly else policy

    def terminate(self) -> None:
        """SIGTERM: take nothing new, let requests finish for a while, then hand them back and leave."""
        self.shell.is_draining = True
        self._leaves_at_s = self.process.now_s() + self.config.drain_timeout_s
        self._network.unlisten(self.client_address)

    def _tick(self) -> None:
        self.shell.tick()
        self._end_silent_clients()
        self.flush()
        if self._leaves_at_s is not None and self._may_leave(self._leaves_at_s):
            self._leave()
            return
        now_s = self.process.now_s()
        pause_s = self.core.next_tick_s(now_s) - now_s
        self.process.after(min(RARE_TICK_S, max(OFTEN_TICK_S, pause_s)), self._tick)

    def _may_leave(self, leaves_at_s: float) -> bool:
        return not self.shell.sessions.session_of or self.process.now_s() >= leaves_at_s

    def _leave(self) -> None:
        self._world.say(self.process.name, "leaves")
        self.shell.abandon_sessions()
        self.flush()
        for stream in (*self._node_streams.values(), *self._client_streams.values()):
            stream.write_all()
            stream.end.close()
        self.process.kill()

    def flush(self) -> None:
        """Have the streams written that have something to say, and ended those that the shell has ended.

        To be called whenever the shell was."""
        self.has_changed = True
        for node_stream in list(self._node_streams.values()):
            if node_stream.attachment.ended.done():
                self.lose_node(node_stream, node_stream.attachment.ended.result().message)
            else:
                node_stream.write_soon()
        for client_stream in self._client_streams.values():
            client_stream.write_soon()

    # ---- nodes -------------------------------------------------------------------------------------

    def _on_node(self, end: End) -> None:
        end.on_message = lambda hello: self._on_hello(end, hello)

    def _on_hello(self, end: End, description: NodeDescription) -> None:
        try:
            attachment = self.shell.attach(description)
        except KVRelayError:
            end.close()
            return
        self._num_streams += 1
        stream = _NodeStream(self, end, attachment, self._num_streams)
        self._node_streams[self._num_streams] = stream
        self._world.say(self.process.name, f"{description.node_id} attached")
        core = self.config.core
        end.send(Welcome(self.process.name, self.shell.router_epoch, core.heartbeat_s, core.lease_s))
        end.on_message = stream.on_frame
        end.on_lost = lambda reason: self.lose_node(stream, reason)
        end.on_window = stream.write_soon
        self.flush()

    def lose_node(self, stream: _NodeStream, reason: str) -> None:
        """A node's stream has ended, or is to end."""
        if self._node_streams.pop(stream.number, None) is not None:
            self._world.say(self.process.name, f"lost {stream.attachment.node_id}: {reason}")
            stream.end.close()
            self.shell.detach(stream.attachment, reason)
            self.flush()

    # ---- clients -----------------------------------------------------------------------------------

    def _on_client(self, end: End) -> None:
        try:
            session = self.shell.open_session(end.label)
        except KVRelayError:
            end.close()
            return
        self._num_streams += 1
        stream = _ClientStream(self, end, session, self._num_streams)
        self._client_streams[self._num_streams] = stream
        end.on_message = stream.on_ask
        end.on_lost = lambda _reason: self._lose_client(stream)
        end.on_window = stream.write_soon

    def _lose_client(self, stream: _ClientStream) -> None:
        if self._client_streams.pop(stream.number, None) is not None:
            stream.end.close()
            self.shell.close_session(stream.session)
            self.flush()

    def _end_silent_clients(self) -> None:
        now_s = self.process.now_s()
        for stream in list(self._client_streams.values()):
            if now_s - stream.heard_s > 2 * KEEPALIVE_S:
                self._lose_client(stream)


class _Stream:
    """Writes what waits, a moment after it came, while the peer reads."""

    def __init__(self, router: SimRouter, end: End, number: int) -> None:
        self.router = router
        self.end = end
        self.number = number
        self._is_writing = False

    @property
    def has_news(self) -> bool:
        raise NotImplementedError

    def write_soon(self) -> None:
        if self.has_news and not self._is_writing and self.end.has_window:
            self._is_writing = True
            process = self.router.process
            process.after(process.world.rng.random() * 0.001, self._write)

    def _write(self) -> None:
        self._is_writing = False
        if self.end.is_open and self.has_news:
            self.write_all()

    def write_all(self) -> None:
        raise NotImplementedError


class _NodeStream(_Stream):
    def __init__(self, router: SimRouter, end: End, attachment: Attachment, number: int) -> None:
        super().__init__(router, end, number)
        self.attachment = attachment
        self._decode_tokens = TokenBatchDecoder().decode

    @property
    def has_news(self) -> bool:
        return self.attachment.outbox.has_news

    def write_all(self) -> None:
        frame = self.attachment.outbox.take_now()
        world = self.router.process.world
        if world.is_traced and frame.commands:
            for command in frame.commands:
                world.say(self.router.process.name, f"to {self.attachment.node_id}: {brief(command)}")
        self.end.send(frame)
        self.attachment.last_sent_s = self.router.process.now_s()

    def on_frame(self, sent: tuple[NodeFrame, Any]) -> None:
        frame, tokens = sent
        if tokens is not None:
            frame = NodeFrame(
                self._decode_tokens(tokens), frame.reports, frame.load, frame.tokenizer, frame.kv
            )
        try:
            self.router.shell.hear(self.attachment, frame)
        except KVRelayError as error:
            self.router.lose_node(self, error.message)
        self.router.flush()


class _ClientStream(_Stream):
    def __init__(self, router: SimRouter, end: End, session: ClientSession, number: int) -> None:
        super().__init__(router, end, number)
        self.session = session
        self.heard_s = router.process.now_s()

    @property
    def has_news(self) -> bool:
        return self.session.outbox.has_news

    def write_all(self) -> None:
        if self.has_news:
            self.end.send(self.session.outbox.take_now())

    def on_ask(self, ask: SessionAsk | CancelById | str) -> None:
        self.heard_s = self.router.process.now_s()
        if isinstance(ask, str):
            self.end.send(PING)
            return
        shell = self.router.shell
        if isinstance(ask, CancelById):
            with suppress(UnknownRequest):
                shell.cancel_request(ask.request_id)
            self.router.flush()
            return
        for stream_id, call in ask.calls:
            shell.submit(self.session, stream_id, call)
        for stream_id in ask.cancel:
            shell.cancel_stream(self.session, stream_id)
        for stream_id in ask.finish:
            shell.finish_stream(self.session, stream_id)
        self.router.flush()


def brief(message: object) -> str:
    """A command or report without its tokens."""
    name = type(message).__name__
    attempt = getattr(message, "attempt", None)
    request = getattr(message, "request", None)
    size = f", {len(request.token_ids)} tokens" if request is not None else ""
    code = getattr(message, "code", "")
    why = f" {code}: {getattr(message, 'message', '')}" if code else ""
    return f"{name}({'' if attempt is None else attempt}{size}{why})"
