"""What a node says about the KV blocks that it holds, for whoever keeps an index of them.

Blocks go by their keys (`core.block_hash.block_key`). A node numbers its batches of changes from 1, alike for
all routers. On one stream an event that says `cleared` is good whatever came before; any other must begin
with the number behind the last one, or something is missing. A *snapshot* has the same form: it says
`cleared`, holds all that the node has, and covers no batch of its own (`num_batches` 0), so that what comes
behind it goes on with the number that it names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

MAX_KEYS_PER_EVENT: Final = 2048
"""Keys in one message; more are split. A router takes a millisecond or two for so many."""


class Tier(StrEnum):
    """Where a node holds a block: in the cache that it computes from, or in host memory behind that."""

    DEVICE = "device"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class KVChanges:
    """What came and went, by tier; no key is both stored and removed in one tier. `cleared`: before these
    changes everything went."""

    stored: Sequence[int] = ()
    removed: Sequence[int] = ()
    host_stored: Sequence[int] = ()
    host_removed: Sequence[int] = ()
    cleared: bool = False

    @property
    def num_keys(self) -> int:
        return len(self.stored) + len(self.removed) + len(self.host_stored) + len(self.host_removed)


@dataclass(frozen=True, slots=True)
class KVEvent:
    """Changes under the numbers ``[first, first + num_batches)``; see the module's text. A snapshot comes as
    `num_parts` events, of which this is `part`, from 0; the parts come one behind the other."""

    first: int
    num_batches: int
    changes: KVChanges
    part: int = 0
    num_parts: int = 1

    @property
    def next(self) -> int:
        """The number that the event behind it begins with."""
        return self.first + self.num_batches

    @property
    def next_part(self) -> int:
        """The part that the event behind it is; 0: it is none, or the first."""
        return (self.part + 1) % self.num_parts


def merge_changes(batches: Iterable[KVChanges]) -> KVChanges:
    """One batch that does what these do, one after another."""
    device: dict[int, bool] = {}
    host: dict[int, bool] = {}
    cleared = False
    for batch in batches:
        if batch.cleared:
            cleared = True
            device.clear()
            host.clear()
        device.update(dict.fromkeys(batch.removed, False))
        device.update(dict.fromkeys(batch.stored, True))
        host.update(dict.fromkeys(batch.host_removed, False))
        host.update(dict.fromkeys(batch.host_stored, True))
    return changes_from(device, host, cleared=cleared)


def changes_from(device: dict[int, bool], host: dict[int, bool], *, cleared: bool = False) -> KVChanges:
    """A batch from each changed key of a tier to whether it is held now."""
    return KVChanges(
        [key for key, is_held in device.items() if is_held],
        [key for key, is_held in device.items() if not is_held],
        [key for key, is_held in host.items() if is_held],
        [key for key, is_held in host.items() if not is_held],
        cleared,
    )


def split_changes(changes: KVChanges, max_keys: int = MAX_KEYS_PER_EVENT) -> list[KVChanges]:
    """The same as batches of at most `max_keys` keys, one after another; never none."""
    if changes.num_keys <= max_keys:
        return [changes]
    columns = ("removed", "host_removed", "stored", "host_stored")
    parts = [
        KVChanges(**{name: column[start : start + max_keys]})
        for name in columns
        for column in [getattr(changes, name)]
        for start in range(0, len(column), max_keys)
    ]
    if changes.cleared:
        parts.insert(0, KVChanges(cleared=True))
    return parts
