"""The seam between engines, which own KV memory, and KV transfer, which moves it.

A transfer speaks of *token ranges of layer ranges*, never of blocks: the bytes on the wire are one
contiguous array ``[num_layers, 2, num_tokens, num_kv_heads, head_dim]`` (2 = key, value), so sender and
receiver may differ in block size and block placement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from hashlib import sha256
from json import dumps
from typing import Protocol

from kvrelay.core.ids import BlockId


class DeviceKind(StrEnum):
    """Where memory is."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class KVFingerprint:
    """What must be equal on both sides of a handoff for its KV to mean the same.

    `model` names the weights (name and digest of config and weight index), `dtype` the cache's element
    type (``float32``, ``bfloat16``), `rope` a digest of the position encoding.
    """

    model: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope: str

    @property
    def digest(self) -> bytes:
        """16 bytes; equal digests mean equal fingerprints."""
        return sha256(dumps(asdict(self), sort_keys=True).encode()).digest()[:16]

    def difference(self, other: KVFingerprint) -> str:
        """Readable list of the fields that differ, empty when none does."""
        mine, theirs = asdict(self), asdict(other)
        return "; ".join(
            f"{name}: {mine[name]!r} != {theirs[name]!r}" for name in mine if mine[name] != theirs[name]
        )


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of one node's KV cache: ``[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]``."""

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    dtype_bytes: int

    @property
    def token_bytes_per_layer(self) -> int:
        """Bytes of key and value of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of key and value of one token in all layers."""
        return self.num_layers * self.token_bytes_per_layer

    @property
    def total_bytes(self) -> int:
        return self.token_bytes * self.block_size * self.num_blocks


class StagingMemory(Protocol):
    """One registered buffer that messages are gathered into, sent from, received in and scattered from."""

    @property
    def address(self) -> int:
        """Address of the first byte, in the device's address space."""
        ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def device_kind(self) -> DeviceKind: ...

    @property
    def device_index(self) -> int: ...

    def host_view(self) -> memoryview:
        """The bytes, writable. Only where `device_kind` is CPU; else AssertionError."""
        ...


class CopyUnderWay(Protocol):
    """A gather or a scatter that a store has begun; on a GPU it is only queued when it begins.

    Of one store, copies are done in the order in which they were begun.
    """

    @property
    def num_bytes(self) -> int:
        """How many it moves in all."""
        ...

    def is_done(self) -> bool:
        """Whether it no longer reads or writes anything; never blocks."""
        ...

    def wait(self) -> int:
        """Return `num_bytes` when it is done."""
        ...


@dataclass(frozen=True, slots=True)
class FinishedCopy:
    """A `CopyUnderWay` that was done when it was begun: what stores in host memory return."""

    num_bytes: int

    def is_done(self) -> bool:
        return True

    def wait(self) -> int:
        return self.num_bytes


class KVStore(Protocol):
    """Access to the KV memory of an engine for one transfer thread, beside the engine's own thread.

    Safe without locks because the two never touch the same slots: a sender reads only positions the
    engine has reported ready and holds; a receiver writes only blocks that are reserved and not yet
    started.
    """

    @property
    def layout(self) -> KVLayout: ...

    @property
    def device_kind(self) -> DeviceKind:
        """Where the staging memory of `allocate_staging` is."""
        ...

    def allocate_staging(self, num_bytes: int) -> StagingMemory:
        """Memory on the device where this store lives (page-aligned on the CPU)."""
        ...

    def gather(
        self,
        block_table: Sequence[BlockId],
        layers: range,
        tokens: range,
        out: StagingMemory,
        out_offset_bytes: int,
    ) -> CopyUnderWay:
        """Begin copying KV of `layers` x `tokens` into `out`.

        `block_table[i]` holds tokens ``[i * block_size, (i + 1) * block_size)`` of the sequence. Written as
        contiguous ``[len(layers), 2, len(tokens), num_kv_heads, head_dim]``.
        """
        ...

    def scatter(
        self,
        block_table: Sequence[BlockId],
        layers: range,
        tokens: range,
        source: StagingMemory,
        source_offset_bytes: int,
    ) -> CopyUnderWay:
        """Begin the inverse of `gather`, which mutates the cache."""
        ...
