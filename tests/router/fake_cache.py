"""The prefix cache of a fake node, as far as a router can know of it: keys, and the real feed of changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvrelay.core.kv_events import KVChanges, KVEvent
from kvrelay.core.node_messages import NodeDescription
from kvrelay.node.kv_feed import KVFeed
from kvrelay.router.block_keys import PromptBlocks


class FakeCache:
    """Holds the blocks used last, half as many as the node has. The feed buffers so little that a stream that
    is written seldom misses events."""

    def __init__(self, description: NodeDescription) -> None:
        self._description = description
        self._feed = KVFeed(max_buffered_keys=12, max_keys_per_event=4)
        self._cursor = self._feed.cursor()
        self.keys: OrderedDict[int, None] = OrderedDict()

    def use(self, token_ids: Sequence[int]) -> None:
        """The KV of these tokens has been computed or received."""
        description = self._description
        keys = PromptBlocks(token_ids).keys(description.block_size, description.fingerprint.digest).tolist()
        stored = [key for key in keys if key not in self.keys]
        for key in keys:
            self.keys[key] = None
            self.keys.move_to_end(key)
        num_over = max(0, len(self.keys) - description.num_blocks // 2)
        removed = [self.keys.popitem(last=False)[0] for _ in range(num_over)]
        stored = [key for key in stored if key in self.keys]
        if stored or removed:
            self._feed.record(KVChanges(stored, removed))

    def begin_stream(self) -> None:
        self._cursor = self._feed.cursor()

    def send_snapshot(self) -> None:
        self._cursor.restart()

    def next_event(self, *, is_load_told: bool) -> KVEvent | None:
        event = self._cursor.take()
        return self._cursor.proof() if event is None and is_load_told else event
