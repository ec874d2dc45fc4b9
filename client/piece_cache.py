"""Token ids of texts that were tokenized before, the least recently used given up first."""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Final

_ENTRY_BYTES: Final = 320
"""What a key, its array and its place in the dictionary take beside the text and the ids."""
_MAX_SHARE: Final = 4
"""A text that would take more than one part in so many of the cache is not kept: it would drive out the
rest."""


class PieceCache:
    """Holds at most about `max_bytes`; 0 holds nothing. Texts under different salts never meet, so that how
    fast an answer comes does not tell what others have asked. May be shared between threads."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._ids_of: OrderedDict[tuple[bytes, str], array[int]] = OrderedDict()
        self._lock = Lock()

    def find(self, texts: Iterable[str], *, salt: bytes = b"") -> list[Sequence[int] | None]:
        """The token ids of each text, not to be changed; None for one that is not here."""
        found: list[Sequence[int] | None] = []
        with self._lock:
            for text in texts:
                key = (salt, text)
                ids = self._ids_of.get(key)
                if ids is not None:
                    self._ids_of.move_to_end(key)
                found.append(ids)
        return found

    def keep(self, text: str, token_ids: Sequence[int], *, salt: bytes = b"") -> None:
        """Remember a text's token ids, unless they are large beside the whole cache."""
        key, ids = (salt, text), array("I", token_ids)
        num_bytes = _num_bytes(key, ids)
        if num_bytes * _MAX_SHARE > self._max_bytes:
            return
        with self._lock:
            if key in self._ids_of:
                return
            self._ids_of[key] = ids
            self.num_bytes += num_bytes
            while self.num_bytes > self._max_bytes:
                self.num_bytes -= _num_bytes(*self._ids_of.popitem(last=False))


def _num_bytes(key: tuple[bytes, str], ids: array[int]) -> int:
    salt, text = key
    return _ENTRY_BYTES + len(salt) + sys.getsizeof(text) + len(ids) * ids.itemsize
