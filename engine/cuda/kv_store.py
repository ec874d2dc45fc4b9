"""KV in GPU memory, for the transfer thread: one launch a message and GPU, on streams of their own.

A cache ``[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]``, or its shards by KV heads on
several GPUs of the host, is seen as machine words; a block table goes up once for all messages of a
transfer. Copies are queued, and asked after later. Kernels that the engine has queued are waited for on the
GPU, never on the CPU: the engine calls `mark_written` before it reports KV that may not be there yet, and
`mark_freed` before it gives blocks to a transfer that queued kernels may use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import torch

from kvrelay.core.ids import BlockId
from kvrelay.core.kv import CopyUnderWay, DeviceKind, KVLayout, StagingMemory
from kvrelay.engine.cuda.copy_kernels import RowCopier
from kvrelay.engine.cuda.copy_stream import CopyEnd, CopyStream, CudaCopyStream, InlineCopyStream, Mark
from kvrelay.engine.cuda.kv_shard import KVShard
from kvrelay.engine.cuda.peer_access import enable_peer_access
from kvrelay.engine.cuda.staging import CudaStaging, kind_of


class CudaKVStore:
    """`KVStore` over `caches`, shared: the shards by KV heads of the cache of `layout`, one for all of it.

    Shard s is ``[num_layers, 2, num_blocks, block_size, num_kv_heads / len(caches), head_dim]`` and has the
    heads from ``s * num_kv_heads / len(caches)`` on. Staging and marks are on the first one's device.

    `gather`, `scatter` and `allocate_staging` belong to the transfer thread, `mark`, `mark_written` and
    `mark_freed` to the engine's. On a CPU device the same arithmetic runs there, without streams.

    Raises:
        ConfigError: two of the devices can't access each other's memory.
    """

    def __init__(
        self,
        layout: KVLayout,
        caches: Sequence[torch.Tensor],
        *,
        copier: RowCopier | None = None,
        streams: Sequence[CopyStream] | None = None,
    ) -> None:
        assert caches
        assert layout.num_kv_heads % len(caches) == 0, f"{len(caches)} shards of {layout.num_kv_heads} heads"
        self._layout = layout
        self._device = caches[0].device
        enable_peer_access(self._device, [cache.device for cache in caches[1:]])
        streams = streams or [_stream_of(cache.device) for cache in caches]
        self._shards = [
            KVShard(layout, cache, index, len(caches), stream, copier)
            for index, (cache, stream) in enumerate(zip(caches, streams, strict=True))
        ]
        self._stream = streams[0]
        self._written = _LayerMarks(layout.num_layers, self._stream)
        self._freed = _LayerMarks(1, self._stream)

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def device_kind(self) -> DeviceKind:
        return kind_of(self._device)

    @property
    def copier_name(self) -> str:
        """``triton`` or ``index_select``."""
        return self._shards[0].copier.name

    def allocate_staging(self, num_bytes: int) -> CudaStaging:
        """Memory beside the cache; also makes the device current on the calling thread, as UCX needs it."""
        for shard in reversed(self._shards):
            shard.stream.adopt_thread()
        staging = CudaStaging(num_bytes, self._device)
        self._stream.settle()
        return staging

    def mark(self) -> Mark | None:
        """What the calling thread's current stream has queued so far, from the engine's thread. Not while a
        CUDA graph is captured: after its replay."""
        return self._stream.mark()

    def mark_written(self, layers: range | None = None, *, at: Mark | None = None) -> None:
        """From the engine's thread, before it reports KV of `layers` (all: None) as ready.

        Later gathers of these layers wait, on the GPU, for the mark `at`, or for all that is queued so far.
        """
        layers = layers if layers is not None else range(self._layout.num_layers)
        self._written.set(layers, self.mark() if at is None else at)

    def mark_freed(self) -> None:
        """From the engine's thread, before it gives a receive blocks that queued kernels may use.

        Later scatters wait, on the GPU, for what the calling thread's current stream has queued so far.
        """
        self._freed.set(range(1), self.mark())

    def gather(
        self,
        block_table: Sequence[BlockId],
        layers: range,
        tokens: range,
        out: StagingMemory,
        out_offset_bytes: int,
    ) -> CopyUnderWay:
        table, out = tuple(block_table), _as_cuda(out)
        num_bytes = self._checked_bytes(table, layers, tokens, out, out_offset_bytes)
        after = self._written.pending(layers)
        return _Copy(
            num_bytes,
            tuple(
                shard.copy(table, layers, tokens, out, out_offset_bytes, after, is_gather=True)
                for shard in self._shards
            ),
        )

    def scatter(
        self,
        block_table: Sequence[BlockId],
        layers: range,
        tokens: range,
        source: StagingMemory,
        source_offset_bytes: int,
    ) -> CopyUnderWay:
        table, source = tuple(block_table), _as_cuda(source)
        num_bytes = self._checked_bytes(table, layers, tokens, source, source_offset_bytes)
        after = self._freed.pending(range(1))
        return _Copy(
            num_bytes,
            tuple(
                shard.copy(table, layers, tokens, source, source_offset_bytes, after, is_gather=False)
                for shard in self._shards
            ),
        )

    def _checked_bytes(
        self,
        block_table: tuple[BlockId, ...],
        layers: range,
        tokens: range,
        staging: CudaStaging,
        offset_bytes: int,
    ) -> int:
        """The size of the message, once it is sure that it lies within all that it touches."""
        assert layers.step == tokens.step == 1
        assert 0 <= layers.start < layers.stop <= self._layout.num_layers
        assert 0 <= tokens.start < tokens.stop
        assert tokens.stop <= len(block_table) * self._layout.block_size, (
            "the block table does not reach that far"
        )
        num_bytes = len(layers) * len(tokens) * self._layout.token_bytes_per_layer
        assert 0 <= offset_bytes <= staging.num_bytes - num_bytes
        return num_bytes


@dataclass(frozen=True, slots=True)
class _Copy:
    """A message's copies on all GPUs that have a share of it."""

    num_bytes: int
    ends: tuple[CopyEnd, ...]

    def is_done(self) -> bool:
        return all(end.is_done() for end in self.ends)

    def wait(self) -> int:
        for end in self.ends:
            end.wait()
        return self.num_bytes


class _LayerMarks:
    """The latest mark of each layer: `set` by the engine's thread, read by the transfer thread."""

    def __init__(self, num_layers: int, stream: CopyStream) -> None:
        self._stream = stream
        self._latest: list[Mark | None] = [None] * num_layers
        self._passed: list[Mark | None] = [None] * num_layers

    def set(self, layers: range, mark: Mark | None) -> None:
        self._latest[layers.start : layers.stop] = repeat(mark, len(layers))

    def pending(self, layers: range) -> list[Mark]:
        """The marks of `layers` that the device has not passed, each once."""
        pending: list[Mark] = []
        for layer in layers:
            mark = self._latest[layer]
            if mark is self._passed[layer] or mark in pending:
                continue
            if self._stream.has_passed(mark):
                self._passed[layer] = mark
            else:
                pending.append(mark)
        return pending


def _stream_of(device: torch.device) -> CopyStream:
    return CudaCopyStream(device) if device.type == "cuda" else InlineCopyStream()


def _as_cuda(staging: StagingMemory) -> CudaStaging:
    assert isinstance(staging, CudaStaging), "staging comes from allocate_staging"
    return staging
