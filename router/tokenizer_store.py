"""The tokenizer bundles that nodes have sent, by digest; bounded."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from typing import Final

from kvrelay.core.tokenizer_chunk import MAX_TOKENIZER_BYTES, TokenizerAssembly

MAX_ASSEMBLIES: Final = 4
MAX_ASSEMBLIES_PER_DIGEST: Final = 2
"""Bundles on their way at a time. Two of a kind, so that one node's loss does not lose the bundle."""
MAX_STORED_BYTES: Final = 2 * MAX_TOKENIZER_BYTES


class TokenizerStore:
    """At most `max_bundles` and `MAX_STORED_BYTES`; the one asked for least lately goes first."""

    def __init__(self, max_bundles: int) -> None:
        self._max_bundles = max_bundles
        self._bundles: OrderedDict[str, bytes] = OrderedDict()
        self._on_their_way: Counter[str] = Counter()
        self._arrived = asyncio.Event()

    def begin(self, digest: str) -> TokenizerAssembly | None:
        """Where to collect a node's bundle, or None if it isn't wanted. Ends by `put` or `abandon`."""
        if not digest or digest in self._bundles:
            return None
        if self._on_their_way[digest] >= MAX_ASSEMBLIES_PER_DIGEST:
            return None
        if self._on_their_way.total() >= MAX_ASSEMBLIES:
            return None
        self._on_their_way[digest] += 1
        return TokenizerAssembly(digest)

    def abandon(self, digest: str) -> None:
        """A bundle that was begun will not come."""
        self._on_their_way[digest] -= 1
        self._on_their_way += Counter()  # drops what has reached zero

    def put(self, digest: str, bundle: bytes) -> None:
        """A bundle that was begun is complete and verified."""
        self.abandon(digest)
        self._bundles[digest] = bundle
        self._bundles.move_to_end(digest)
        while len(self._bundles) > self._max_bundles or self._num_bytes > MAX_STORED_BYTES:
            self._bundles.popitem(last=False)
        self._arrived.set()
        self._arrived = asyncio.Event()

    async def get(self, digest: str, wait_s: float) -> bytes | None:
        """The bundle, waiting for it while it is on its way; None if it does not come."""
        try:
            async with asyncio.timeout(wait_s):
                while digest not in self._bundles and self._on_their_way[digest]:
                    await self._arrived.wait()
        except TimeoutError:
            return None
        bundle = self._bundles.get(digest)
        if bundle is not None:
            self._bundles.move_to_end(digest)
        return bundle

    @property
    def _num_bytes(self) -> int:
        return sum(len(bundle) for bundle in self._bundles.values())
