"""Collects the effects of one event, and all that one event has to tell a router in one frame."""

from __future__ import annotations

from kvrelay.core.node_messages import Report
from kvrelay.node.events import NodeEffect, SendFrame, TokenColumns


class EffectBuffer:
    """Mutable, for the time of one `handle`."""

    __slots__ = ("_effects", "_reports", "_tokens")

    def __init__(self) -> None:
        self._effects: list[NodeEffect] = []
        self._tokens: dict[int, TokenColumns] = {}
        self._reports: dict[int, list[Report]] = {}

    def add(self, effect: NodeEffect) -> None:
        """Perform this, in order, before anything is told to a router."""
        self._effects.append(effect)

    def report(self, router_epoch: int, report: Report) -> None:
        """Tell that router, after the tokens."""
        self._reports.setdefault(router_epoch, []).append(report)

    def tokens(self, router_epoch: int) -> TokenColumns:
        """Where that router's tokens go."""
        columns = self._tokens.get(router_epoch)
        if columns is None:
            columns = self._tokens[router_epoch] = TokenColumns()
        return columns

    def take(self) -> list[NodeEffect]:
        """All effects, the frames last."""
        for router_epoch in dict.fromkeys([*self._tokens, *self._reports]):
            frame = SendFrame(
                router_epoch, self._tokens.get(router_epoch), tuple(self._reports.get(router_epoch, ()))
            )
            self._effects.append(frame)
        return self._effects
