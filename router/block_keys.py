"""The keys under which nodes tell of a prompt's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvrelay.core.block_hash import chain_hashes, root_hash

_WORDS_PER_HASH: Final = 4


class PromptBlocks:
    """The blocks of one token sequence. They are hashed when they are asked for, once for each block size and
    KV fingerprint."""

    __slots__ = ("_cache_salt", "_keys", "token_ids")

    def __init__(self, token_ids: Sequence[int], cache_salt: bytes = b"") -> None:
        self.token_ids = token_ids
        self._cache_salt = cache_salt
        self._keys: dict[tuple[int, bytes], NDArray[np.uint64]] = {}

    def keys(self, block_size: int, fingerprint_digest: bytes) -> NDArray[np.uint64]:
        """Keys (`core.block_hash.block_key`) of the full blocks, ``[len(token_ids) // block_size]``, first to
        last, as nodes of that block size and fingerprint have them. Read only."""
        keys = self._keys.get((block_size, fingerprint_digest))
        if keys is None:
            hashes = chain_hashes(self.token_ids, block_size, root_hash(self._cache_salt, fingerprint_digest))
            keys = np.frombuffer(b"".join(hashes), np.dtype("<u8"))[::_WORDS_PER_HASH]
            self._keys[block_size, fingerprint_digest] = keys
        return keys
