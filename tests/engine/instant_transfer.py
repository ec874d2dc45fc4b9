"""What a transfer could read of a simulated engine's KV, at the earliest moment that it may."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvrelay.core.request import TokenRequest
from kvrelay.engine.interface import KVReady


class InstantTransfer:
    """Gathers each range the moment it is announced, as the transfer thread may, and keeps it by key."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.ready: dict[str, list[tuple[KVReady, bytes]]] = {}
        engine.set_kv_ready_listener(self)

    def __call__(self, ready: KVReady) -> None:
        kv = self.engine.kv
        size = len(ready.layers) * len(ready.tokens) * kv.layout.token_bytes_per_layer
        staging = kv.allocate_staging(size)
        kv.gather(ready.block_table, ready.layers, ready.tokens, staging, 0)
        self.ready.setdefault(ready.key, []).append((ready, bytes(staging.host_view()[:size])))

    def check(self, key: str, request: TokenRequest) -> None:
        """All KV of the prompt came once, in order, and is what its tokens say."""
        layout = self.engine.kv.layout
        stamps = self.engine._executor._stamps
        expected = stamps.stamps(stamps.prefix_sums(request.token_ids))
        cells: list[tuple[int, int]] = []
        for ready, received in self.ready[key]:
            layers, tokens = ready.layers, ready.tokens
            wanted = expected[layers.start : layers.stop, :, tokens.start : tokens.stop]
            assert np.array_equal(np.frombuffer(received, dtype=np.uint64).reshape(wanted.shape), wanted)
            cells += [(tokens.start, layer) for layer in layers for _ in tokens]
        assert cells == sorted(cells), "in order of tokens, then of layers"
        assert len(cells) == layout.num_layers * len(request.token_ids)
