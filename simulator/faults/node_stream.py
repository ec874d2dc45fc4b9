"""One router as a simulated node sees it: dial, attach, listen, and dial again when the stream is lost."""

from __future__ import annotations

from typing import Protocol

from kvrelay.codec.cluster import TokenBatchEncoder
from kvrelay.core.errors import KVRelayError
from kvrelay.core.node_messages import NodeDescription, NodeFrame, NodeLoad, Report, RouterFrame, Welcome
from kvrelay.node.backoff import Backoff
from kvrelay.node.config import NodeConfig
from kvrelay.node.events import TokenColumns
from kvrelay.node.kv_feed import KVFeed
from kvrelay.node.next_frame import NextFrame
from kvrelay.simulator.faults.network import End, Network
from kvrelay.simulator.faults.process import Process, Timer
from kvrelay.simulator.faults.router_process import brief


class StreamOwner(Protocol):
    """Who hears from it: the calls of `kvrelay.node.router_link.LinkOwner`."""

    def on_welcome(self, stream: NodeStream, welcome: Welcome) -> None: ...

    def on_router_frame(self, router_epoch: int, frame: RouterFrame) -> None: ...

    def on_stream_lost(self, stream: NodeStream, router_epoch: int) -> None: ...

    def current_load(self) -> NodeLoad: ...


class NodeStream:
    """Does what `RouterLink` and `FrameWriter` do, with their pure parts, on the virtual network."""

    def __init__(
        self,
        process: Process,
        network: Network,
        address: str,
        config: NodeConfig,
        description: NodeDescription,
        kv_feed: KVFeed,
        owner: StreamOwner,
    ) -> None:
        self.address = address
        self._process = process
        self._network = network
        self._config = config
        self._description = description
        self._kv_feed = kv_feed
        self._owner = owner
        self._backoff = Backoff(config.reconnect_initial_s, config.reconnect_max_s, process.world.rng)
        self._end: End | None = None
        self._dial_number = 0
        self._dialled_s = 0.0
        self._next: NextFrame | None = None
        self._encode_tokens = TokenBatchEncoder().encode
        self._heartbeat = Timer(process, self._on_heartbeat)
        self._heartbeat_s = 1.0
        self._load_due = Timer(process, self._on_load_due)
        self._no_ride = Timer(process, self._wake)
        self._is_writing = False
        self._is_leaving = False
        self._epoch = 0

    # ---- what RouterLink does ----------------------------------------------------------------------

    def dial(self) -> None:
        """Begin to attach."""
        if self._is_leaving:
            return
        self._dial_number += 1
        number = self._dial_number
        self._dialled_s = self._process.now_s()
        self._network.dial(
            self._process,
            self.address,
            lambda end: self._on_open(number, end),
            lambda reason: self._retry(number, reason),
        )
        self._process.after(self._config.connect_timeout_s, lambda: self._give_up_dial(number))

    def _give_up_dial(self, number: int) -> None:
        if number == self._dial_number and self._next is None:
            end, self._end = self._end, None
            if end is not None:
                end.close()
            self._retry(number, "no answer within connect_timeout_s")

    def _retry(self, number: int, _reason: str) -> None:
        if number != self._dial_number or self._is_leaving:
            return
        self._dial_number += 1
        if self._process.now_s() - self._dialled_s > self._config.reconnect_max_s:
            self._backoff.reset()
        self._process.after(self._backoff.next_delay_s(), self.dial)

    def _on_open(self, number: int, end: End) -> None:
        if number != self._dial_number or self._is_leaving:
            end.close()
            return
        self._end = end
        end.on_message = lambda welcome: self._on_welcome(number, end, welcome)
        end.on_lost = lambda reason: self._on_greeting_lost(number, reason)
        end.send(self._description)

    def _on_greeting_lost(self, number: int, reason: str) -> None:
        self._end = None
        self._retry(number, reason)

    def _on_welcome(self, number: int, end: End, welcome: Welcome) -> None:
        if number != self._dial_number:
            return
        self._epoch = welcome.router_epoch
        self._heartbeat_s = welcome.heartbeat_s
        self._encode_tokens = TokenBatchEncoder().encode
        self._next = NextFrame(
            self._owner.current_load,
            self._process,
            max_pending_tokens=self._config.max_pending_tokens,
            load_interval_s=self._config.load_interval_s,
            kv=self._kv_feed.cursor(),
        )
        end.on_message = self._on_frame
        end.on_lost = lambda reason: self._lose(reason)
        end.on_window = self._wake
        self._process.world.say(self._process.name, f"attached to {welcome.router_id}")
        self._owner.on_welcome(self, welcome)
        self._wake()

    def _on_frame(self, frame: RouterFrame | Welcome) -> None:
        if isinstance(frame, RouterFrame):
            self._owner.on_router_frame(self._epoch, frame)

    def close_stream(self, reason: str) -> None:
        """End the stream that is open now, if there is one; it is dialled again."""
        if self._next is not None:
            self._process.deliver(lambda: self._lose(reason))

    def _lose(self, reason: str) -> None:
        if self._next is None:
            return
        if self._end is not None:
            self._end.close()
        self._end = self._next = None
        self._heartbeat.clear()
        self._forget_load_timers()
        self._process.world.say(self._process.name, f"lost its stream to {self.address}: {reason}")
        self._owner.on_stream_lost(self, self._epoch)
        self._retry(self._dial_number, reason)

    def leave(self) -> None:
        """Write what waits, end the stream, dial no more."""
        self._is_leaving = True
        if self._next is not None and self._end is not None:
            self._write_frame(is_heartbeat=False)
            self._end.close()

    # ---- what FrameWriter does ---------------------------------------------------------------------

    def send(self, tokens: TokenColumns | None, reports: tuple[Report, ...]) -> None:
        """Tell the router; dropped if it is not attached."""
        if self._next is None:
            return
        try:
            self._next.add(tokens, reports)
        except KVRelayError as error:
            self.close_stream(error.message)
        self._wake()

    def load_changed(self) -> None:
        """The node's load is to be told again."""
        if self._next is not None and self._load_due.due_s is None and not self._next.is_load_due:
            self._load_due.set(self._next.load_due_in_s())

    def _on_load_due(self) -> None:
        if self._next is not None:
            self._next.is_load_due = True
            self._no_ride.set(self._config.load_interval_s / 2)

    def _forget_load_timers(self) -> None:
        self._load_due.clear()
        self._no_ride.clear()

    def kv_changed(self) -> None:
        """There are KV events to be told."""
        self._wake()

    def send_kv_snapshot(self) -> None:
        """Tell all that the prefix cache holds."""
        if self._next is not None:
            self._next.restart_kv()
            self._wake()

    def _wake(self) -> None:
        if self._next is None or self._is_writing or self._end is None or not self._end.has_window:
            return
        self._is_writing = True
        self._process.after(self._process.world.rng.random() * 0.0005, self._write)

    def _write(self) -> None:
        self._is_writing = False
        if self._next is not None:
            self._write_frame(is_heartbeat=False)
            if self._next.has_more_kv:
                self._wake()

    def _on_heartbeat(self) -> None:
        if self._end is not None and self._end.has_window:
            self._write_frame(is_heartbeat=True)

    def _write_frame(self, *, is_heartbeat: bool) -> None:
        assert self._next is not None
        assert self._end is not None
        self._heartbeat.set(self._heartbeat_s)
        if is_heartbeat or self._next.is_load_due:
            self._forget_load_timers()
        frame = self._next.take(is_heartbeat=is_heartbeat)
        if frame is None:
            return
        world = self._process.world
        if world.is_traced and (frame.tokens or frame.reports):
            world.say(self._process.name, f"to {self.address}: {_brief_frame(frame)}")
        tokens = self._encode_tokens(frame.tokens) if frame.tokens is not None else None
        self._end.send((frame, tokens))


def _brief_frame(frame: NodeFrame) -> str:
    parts = [brief(report) for report in frame.reports]
    if frame.tokens is not None:
        rows = zip(frame.tokens.attempts, frame.tokens.first_indices, frame.tokens.counts, strict=True)
        parts.insert(0, "tokens " + " ".join(f"{attempt}[{at}:{at + n}]" for attempt, at, n in rows))
    return ", ".join(parts)
