"""The seam between the torch engine and the device that it runs on."""

from __future__ import annotations

from typing import Final, Protocol

import torch
from torch import Tensor

from kvrelay.core.kv import KVLayout, KVStore
from kvrelay.engine.attention import Attention
from kvrelay.engine.cpu_attention import CpuAttention
from kvrelay.engine.host_kv import HostKVStore
from kvrelay.engine.linear import (
    Embedding,
    Linear,
    PackedEmbedding,
    PackedLinear,
    PlainEmbedding,
    PlainLinear,
)
from kvrelay.engine.row_operations import RowOperations, TorchRows

TORCH_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Device(Protocol):
    """Weights come as host tensors and may be dropped by the caller once they have been given."""

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear: ...

    def embedding(self, weight: Tensor) -> Embedding: ...

    def tied_embedding(self, weight: Tensor) -> tuple[Embedding, Linear]:
        """Input embedding and output layer that share one matrix ``[vocab_size, hidden_size]``."""
        ...

    def kv_cache(self, layout: KVLayout) -> Tensor:
        """Zeros of the layout's shape."""
        ...

    def kv_store(self, layout: KVLayout, cache: Tensor) -> KVStore: ...

    def attention(self, cache: Tensor, num_heads: int) -> Attention: ...

    def rows(self, dtype: torch.dtype, head_dim: int, rms_norm_eps: float) -> RowOperations: ...


class CpuDevice:
    """Host memory; weights are packed by oneDNN where torch has it."""

    def __init__(self) -> None:
        self._packs = bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return PackedLinear(weight, bias) if self._packs else PlainLinear(weight, bias)

    def embedding(self, weight: Tensor) -> Embedding:
        return PlainEmbedding(weight)

    def tied_embedding(self, weight: Tensor) -> tuple[Embedding, Linear]:
        if self._packs:
            linear = PackedLinear(weight)
            embedding = PackedEmbedding.try_build(linear, weight)
            if embedding is not None:
                return embedding, linear
        return PlainEmbedding(weight), PlainLinear(weight)

    def kv_cache(self, layout: KVLayout) -> Tensor:
        shape = (
            layout.num_layers,
            2,
            layout.num_blocks,
            layout.block_size,
            layout.num_kv_heads,
            layout.head_dim,
        )
        return torch.zeros(shape, dtype=TORCH_DTYPES[layout.dtype])

    def kv_store(self, layout: KVLayout, cache: Tensor) -> KVStore:
        num_slots = layout.num_blocks * layout.block_size
        slots = cache.view(torch.uint8).view(layout.num_layers, 2, num_slots, -1)
        return HostKVStore(layout, slots.numpy())

    def attention(self, cache: Tensor, num_heads: int) -> Attention:
        return CpuAttention(cache, num_heads)

    def rows(self, dtype: torch.dtype, head_dim: int, rms_norm_eps: float) -> RowOperations:
        return TorchRows(rms_norm_eps)
