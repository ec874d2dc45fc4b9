"""Chained block hashes: the name of a KV block is the hash of everything that determines its content.

``h(i) = sha256(h(i-1) || token ids of block i)``, with ``h(-1) = sha256(salt || fingerprint)``. Two equal
hashes therefore mean equal tokens from position 0 on, under one model and layout; SHA-256 makes a
chance or forged collision infeasible, so one prompt can never be handed another's KV.
Source: vLLM's prefix-caching design document for the chaining; FIPS 180-4 for SHA-256.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, NewType, cast

BlockHash = NewType("BlockHash", bytes)
"""32 bytes."""

_TOKEN_BYTES: Final = struct.calcsize("I")


def root_hash(salt: bytes = b"", fingerprint: bytes = b"") -> BlockHash:
    """What the first block's hash is chained to."""
    return BlockHash(sha256(len(salt).to_bytes(4, "big") + salt + fingerprint).digest())


def next_block_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of one block, full or partial, whose predecessor is `parent`."""
    return BlockHash(sha256(parent + array("I", token_ids).tobytes()).digest())


def chain_hashes(
    token_ids: Sequence[int], block_size: int, root: BlockHash, *, known: Sequence[BlockHash] = ()
) -> list[BlockHash]:
    """Hashes of all full blocks of `token_ids`; those in `known` are taken as given.

    Returns ``len(token_ids) // block_size`` hashes.
    """
    hashes: list[bytes] = list(known)
    parent: bytes = hashes[-1] if hashes else root
    num_hashed, num_full = len(hashes) * block_size, len(token_ids) // block_size * block_size
    content = struct.pack(f"{max(0, num_full - num_hashed)}I", *token_ids[num_hashed:num_full])
    for (block,) in struct.iter_unpack(f"{block_size * _TOKEN_BYTES}s", content):
        parent = sha256(parent + block).digest()
        hashes.append(parent)
    return cast(list[BlockHash], hashes)


def block_key(block_hash: BlockHash) -> int:
    """A block's name in KV events and in the router's index, ``0 <= key < 2**64``: the first 8 bytes of its
    hash. Good for a hint; what a node does with a block it decides by the whole hash."""
    return int.from_bytes(block_hash[:8], "little")


def sequence_digest(token_ids: Sequence[int], root: BlockHash) -> BlockHash:
    """One hash over a whole token sequence: a handoff carries it to prove that both nodes mean one prompt."""
    return next_block_hash(root, token_ids)


@dataclass(frozen=True, slots=True)
class DigestedTokens:
    """Tokens of which somebody may turn out to have the first ones only. `root` as in `root_hash`."""

    token_ids: tuple[int, ...]
    root: BlockHash

    def digest(self, num_tokens: int) -> BlockHash:
        """`sequence_digest` of the first `num_tokens`."""
        return sequence_digest(self.token_ids[:num_tokens], self.root)
