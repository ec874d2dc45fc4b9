"""Tells the listener which KV of prefill-only sequences became final while a step goes through the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from kvrelay.core.ids import BlockId
from kvrelay.core.kv import DeviceKind, KVLayout, KVStore
from kvrelay.engine.interface import KVReady, KVReadyListener, SequenceKey
from kvrelay.engine.sequence import Chunk, LiveSequence, Purpose

MIN_GROUP_BYTES: Final = {DeviceKind.CPU: 1 << 20, DeviceKind.CUDA: 32 << 20}
"""A group of layers below this is not worth a message of its own: NVLink takes a tenth of a millisecond for
32 MiB, about what the message costs Python, which the engine's thread needs to queue its kernels."""


def default_layers_per_group(layout: KVLayout, device_kind: DeviceKind, num_tokens: int) -> int:
    """Fewest layers whose KV of `num_tokens` tokens reaches `MIN_GROUP_BYTES`, at most all."""
    layer_bytes = layout.token_bytes_per_layer * num_tokens
    return min(layout.num_layers, -(-MIN_GROUP_BYTES[device_kind] // layer_bytes))


def announce_prefix_hit(sequence: LiveSequence, num_layers: int, listener: KVReadyListener) -> None:
    """Report the cached prefix of a prefill-only sequence whose first step has its turn."""
    if sequence.purpose is Purpose.PREFILL_ONLY and sequence.num_cached_tokens:
        listener(
            KVReady(
                sequence.key,
                tuple(sequence.block_table),
                range(num_layers),
                range(sequence.num_cached_tokens),
            )
        )


@dataclass(frozen=True, slots=True)
class _Watched:
    sequence: LiveSequence
    key: SequenceKey
    block_table: tuple[BlockId, ...]
    tokens: range
    layers_per_group: int


class KVProgress:
    """One step's progress. The executor calls `layer_done` for each layer, first to last; sequences that are
    not `is_live` any more are not reported."""

    def __init__(
        self,
        chunks: Iterable[Chunk],
        kv: KVStore,
        listener: KVReadyListener,
        layers_per_group: int | None,
        is_live: Callable[[LiveSequence], bool],
    ) -> None:
        self._is_live = is_live
        self._num_layers = kv.layout.num_layers
        self._listener = listener
        self._watched = [
            _Watched(
                chunk.sequence,
                chunk.sequence.key,
                tuple(chunk.sequence.block_table),
                range(chunk.start, chunk.end),
                layers_per_group or default_layers_per_group(kv.layout, kv.device_kind, chunk.num_tokens),
            )
            for chunk in chunks
            if chunk.sequence.purpose is Purpose.PREFILL_ONLY
        ]

    def layer_done(self, layer: int) -> None:
        """KV of `layer` is in the cache for all of the step's tokens."""
        num_done = layer + 1
        for watched in self._watched:
            size = watched.layers_per_group
            if num_done % size and num_done != self._num_layers:
                continue
            if not self._is_live(watched.sequence):
                continue
            layers = range(layer // size * size, num_done)
            self._listener(KVReady(watched.key, watched.block_table, layers, watched.tokens))
