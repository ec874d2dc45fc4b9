"""What the next frame to one router says: tokens and reports, load, KV events. No stream, timer or loop."""

from __future__ import annotations

from collections.abc import Callable

from kvrelay.core.clock import Clock
from kvrelay.core.node_messages import NodeFrame, NodeLoad, Report
from kvrelay.node.events import TokenColumns
from kvrelay.node.kv_feed import KVCursor
from kvrelay.node.load_pacer import LoadPacer
from kvrelay.node.outbox import Outbox


class NextFrame:
    """Of one stream. `read_load` gives the node's load when a frame is to carry it, `kv` at most one KV event
    for each frame."""

    def __init__(
        self,
        read_load: Callable[[], NodeLoad],
        clock: Clock,
        *,
        max_pending_tokens: int,
        load_interval_s: float,
        kv: KVCursor,
    ) -> None:
        self._read_load = read_load
        self._clock = clock
        self._kv = kv
        self._outbox = Outbox(max_pending_tokens)
        self._pacer = LoadPacer(load_interval_s)
        self.is_load_due = True
        """Whether the next frame tells the load, if that has changed."""

    @property
    def has_more_kv(self) -> bool:
        """Whether KV events wait."""
        return self._kv.has_more

    @property
    def is_outbox_empty(self) -> bool:
        """Whether no tokens or reports wait."""
        return self._outbox.is_empty

    def add(self, tokens: TokenColumns | None, reports: tuple[Report, ...]) -> None:
        """Have it say this, too.

        Raises:
            Overloaded: the router reads too slowly.
        """
        self._outbox.add(tokens, reports)

    def restart_kv(self) -> None:
        """Tell all that the node's prefix cache holds."""
        self._kv.restart()

    def load_due_in_s(self) -> float:
        """How long until the load may be told again."""
        return self._pacer.due_in_s(self._clock.now_s())

    def take(self, *, is_heartbeat: bool) -> NodeFrame | None:
        """The next frame; None: there is nothing to say, and it need not be said."""
        load: NodeLoad | None = None
        if is_heartbeat or self.is_load_due:
            load = self._pacer.take(self._read_load(), self._clock.now_s(), is_heartbeat=is_heartbeat)
            self.is_load_due = False
        kv = self._kv.take()
        if self._outbox.is_empty and load is None and kv is None and not is_heartbeat:
            return None
        if kv is None and (load is not None or is_heartbeat):
            kv = self._kv.proof()
        return self._outbox.take(load, kv)
