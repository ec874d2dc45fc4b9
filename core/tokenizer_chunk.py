"""A model's tokenizer bundle on its way from a node through a router to a client, in bounded pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from kvrelay.core.errors import InvalidRequest

MAX_TOKENIZER_BYTES: Final = 64 << 20
TOKENIZER_CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class TokenizerChunk:
    """Bytes ``[offset_bytes, offset_bytes + len(data))`` of the bundle whose hex SHA-256 is `digest`."""

    digest: str
    total_bytes: int
    offset_bytes: int
    data: bytes


def tokenizer_digest(bundle: bytes) -> str:
    """Hex SHA-256 of a bundle."""
    return sha256(bundle).hexdigest()


def split_tokenizer(bundle: bytes) -> Iterator[TokenizerChunk]:
    """A bundle's chunks, in order."""
    digest = tokenizer_digest(bundle)
    for offset in range(0, len(bundle), TOKENIZER_CHUNK_BYTES):
        yield TokenizerChunk(digest, len(bundle), offset, bundle[offset : offset + TOKENIZER_CHUNK_BYTES])


class TokenizerAssembly:
    """Collects the chunks of one bundle, in order, never more than announced."""

    def __init__(self, expected_digest: str) -> None:
        self._expected_digest = expected_digest
        self._total_bytes = 0
        self._data = bytearray()

    def add(self, chunk: TokenizerChunk) -> bytes | None:
        """Take the next chunk; returns the whole bundle once it is complete and its digest is right.

        Raises:
            InvalidRequest: another bundle, out of order, too large, or the whole does not match its digest.
        """
        self._check(chunk)
        self._total_bytes = chunk.total_bytes
        self._data += chunk.data
        if len(self._data) < self._total_bytes:
            return None
        bundle = bytes(self._data)
        if tokenizer_digest(bundle) != self._expected_digest:
            raise InvalidRequest(
                "tokenizer.digest does not match the bytes that came", field="tokenizer.digest"
            )
        return bundle

    def _check(self, chunk: TokenizerChunk) -> None:
        if chunk.digest != self._expected_digest:
            raise InvalidRequest(
                f"tokenizer.digest is {chunk.digest!r}, expected {self._expected_digest!r}",
                field="tokenizer.digest",
            )
        if not 1 <= chunk.total_bytes <= MAX_TOKENIZER_BYTES or self._total_bytes not in (
            0,
            chunk.total_bytes,
        ):
            raise InvalidRequest(
                f"tokenizer.total_bytes is {chunk.total_bytes}; it must be from 1 to {MAX_TOKENIZER_BYTES}"
                " and the same in every chunk",
                field="tokenizer.total_bytes",
            )
        if chunk.offset_bytes != len(self._data):
            raise InvalidRequest(
                f"tokenizer.offset_bytes is {chunk.offset_bytes}, expected {len(self._data)}",
                field="tokenizer.offset_bytes",
            )
        if not chunk.data or len(self._data) + len(chunk.data) > chunk.total_bytes:
            raise InvalidRequest(
                f"tokenizer.data: {len(chunk.data)} bytes at {chunk.offset_bytes} of {chunk.total_bytes}",
                field="tokenizer.data",
            )
