"""What has changed in a set of blocks since somebody asked last."""

from __future__ import annotations

from typing import Final

from kvrelay.core.block_hash import BlockHash

MAX_CHANGES: Final = 1 << 16


class ChangeLog:
    """Which blocks came or went, by hash. It is *lost* at first, and again once more than `max_changes` have
    changed since the last `take`: then it notes nothing, at next to no cost, until `restart`."""

    __slots__ = ("_changes", "_max_changes")

    def __init__(self, max_changes: int = MAX_CHANGES) -> None:
        self._max_changes = max_changes
        self._changes: dict[BlockHash, bool] | None = None

    @property
    def is_lost(self) -> bool:
        """Whether only a look at everything can tell what has changed."""
        return self._changes is None

    def note(self, block_hash: BlockHash, *, is_held: bool) -> None:
        """This block came or went."""
        changes = self._changes
        if changes is None:
            return
        changes[block_hash] = is_held
        if len(changes) > self._max_changes:
            self._changes = None

    def take(self) -> dict[BlockHash, bool]:
        """Each block that changed since the last call, and whether it is held now. Not while it is lost."""
        assert self._changes is not None, "the log is lost"
        taken = self._changes
        if taken:
            self._changes = {}
        return taken

    def restart(self) -> None:
        """The caller has looked at everything: note what changes from now on."""
        self._changes = {}
