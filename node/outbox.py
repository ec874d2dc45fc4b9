"""What is to be told to one router: merged while the stream is busy, bounded."""

from __future__ import annotations

from kvrelay.core.errors import Overloaded
from kvrelay.core.kv_events import KVEvent
from kvrelay.core.node_messages import NodeFrame, NodeLoad, Report, TokenBatch
from kvrelay.node.events import TokenColumns


class Outbox:
    """Merges frames in order: an attempt's tokens stay before its terminal report.

    It holds at most `max_tokens` tokens, and as many reports.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._tokens: TokenColumns | None = None
        self._reports: list[Report] = []

    @property
    def is_empty(self) -> bool:
        return self._tokens is None and not self._reports

    def add(self, tokens: TokenColumns | None, reports: tuple[Report, ...]) -> None:
        """Queue behind what is there; takes over `tokens`.

        Raises:
            Overloaded: the router reads too slowly.
        """
        num_tokens = len(self._tokens.token_ids) if self._tokens is not None else 0
        num_more_tokens = len(tokens.token_ids) if tokens is not None else 0
        most = max(num_tokens + num_more_tokens, len(self._reports) + len(reports))
        if most > self._max_tokens:
            raise Overloaded(f"{most} tokens or reports wait to be sent, at most {self._max_tokens} may")
        if self._tokens is None:
            self._tokens = tokens
        elif tokens is not None:
            self._tokens.extend(tokens)
        self._reports.extend(reports)

    def take(self, load: NodeLoad | None, kv: KVEvent | None = None) -> NodeFrame:
        """All that waits, with `load` and `kv`, as one frame; a heartbeat if that is nothing."""
        columns, reports = self._tokens, tuple(self._reports)
        self._tokens = None
        self._reports.clear()
        return NodeFrame(_as_batch(columns), reports, load, kv=kv)


def _as_batch(columns: TokenColumns | None) -> TokenBatch | None:
    if columns is None:
        return None
    return TokenBatch(
        columns.attempts, columns.first_indices, columns.counts, columns.token_ids, columns.logprobs
    )
