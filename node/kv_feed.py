"""The KV events of one node, for all its routers: what it holds, what changed, how far each stream is.

Pure. The feed mirrors what the engine holds, so a snapshot needs no word from the engine and fits the numbers
of the batches before and after it. It keeps the latest batches up to a bound; a stream that is further behind
goes on with the oldest that is kept, and its router sees from the number that something is missing, and asks
for a snapshot.
"""

from __future__ import annotations

from array import array
from collections import deque

from kvrelay.core.kv_events import MAX_KEYS_PER_EVENT, KVChanges, KVEvent, merge_changes, split_changes


class KVFeed:
    """Keeps batches of at most `max_buffered_keys` keys for streams that are behind, a batch counting as one
    key more than it has; and the newest one in any case."""

    def __init__(self, max_buffered_keys: int, max_keys_per_event: int = MAX_KEYS_PER_EVENT) -> None:
        self.next = 1
        """The number of the next batch."""
        self._max_buffered_keys = max_buffered_keys
        self._max_keys_per_event = max_keys_per_event
        self._device: dict[int, None] = {}
        self._host: dict[int, None] = {}
        self._batches: deque[KVEvent] = deque()
        self._num_buffered_keys = 0

    def record(self, changes: KVChanges) -> None:
        """The engine's prefix cache has changed."""
        for batch in split_changes(changes, self._max_keys_per_event):
            self._apply(batch)
            self._batches.append(KVEvent(self.next, 1, batch))
            self._num_buffered_keys += 1 + batch.num_keys
            self.next += 1
        while self._num_buffered_keys > self._max_buffered_keys and len(self._batches) > 1:
            self._num_buffered_keys -= 1 + self._batches.popleft().changes.num_keys

    def cursor(self) -> KVCursor:
        """The place of a new stream: it begins with a snapshot."""
        return KVCursor(self)

    def snapshot(self) -> deque[KVEvent]:
        """All that the node holds now, in events that are to be sent one after another."""
        whole = KVChanges(stored=array("Q", self._device), host_stored=array("Q", self._host), cleared=True)
        parts = split_changes(whole, self._max_keys_per_event)
        return deque(KVEvent(self.next, 0, part, index, len(parts)) for index, part in enumerate(parts))

    def read(self, at: int) -> KVEvent | None:
        """The batches from number `at` on that fit one event, or later ones where that is not kept any more;
        None: there is none."""
        if at >= self.next:
            return None
        place = max(0, at - self._batches[0].first)
        taken = [self._batches[place]]
        num_keys = taken[0].changes.num_keys
        while place + len(taken) < len(self._batches):
            batch = self._batches[place + len(taken)]
            num_keys += batch.changes.num_keys
            if num_keys > self._max_keys_per_event:
                break
            taken.append(batch)
        if len(taken) == 1:
            return taken[0]
        changes = merge_changes(batch.changes for batch in taken)
        return KVEvent(taken[0].first, len(taken), changes)

    def _apply(self, changes: KVChanges) -> None:
        if changes.cleared:
            self._device.clear()
            self._host.clear()
        for held, stored, removed in (
            (self._device, changes.stored, changes.removed),
            (self._host, changes.host_stored, changes.host_removed),
        ):
            for key in removed:
                held.pop(key, None)
            held.update(dict.fromkeys(stored))


class KVCursor:
    """How far one stream has come: a snapshot first, then the batches behind it."""

    def __init__(self, feed: KVFeed) -> None:
        self._feed = feed
        self._parts: deque[KVEvent] = deque()
        self._next = feed.next
        self._wants_snapshot = True

    @property
    def has_more(self) -> bool:
        """Whether `take` would give an event."""
        return self._wants_snapshot or bool(self._parts) or self._next < self._feed.next

    def restart(self) -> None:
        """Begin again with a snapshot."""
        self._wants_snapshot = True

    def take(self) -> KVEvent | None:
        """What is to be sent next; None: all is sent."""
        if self._wants_snapshot:
            self._wants_snapshot = False
            self._parts = self._feed.snapshot()
            self._next = self._feed.next
        if self._parts:
            return self._parts.popleft()
        event = self._feed.read(self._next)
        if event is not None:
            self._next = event.next
        return event

    def proof(self) -> KVEvent | None:
        """An event without changes, from which the router sees whether it has all that was sent; None while
        there is more to send."""
        return None if self.has_more else KVEvent(self._next, 0, KVChanges())
