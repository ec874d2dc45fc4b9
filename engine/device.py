"""The seam between the torch engine and the device that it runs on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch import Tensor

from kvrelay.core.kv import KVLayout, KVStore
from kvrelay.engine.attention import Attention
from kvrelay.engine.block_mover import BlockMover, CpuBlockMover
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

if TYPE_CHECKING:
    from kvrelay.engine.compiled.openmp import OpenMP
    from kvrelay.engine.model.transformer import Transformer
    from kvrelay.engine.model_runner import ModelRunner
    from kvrelay.engine.paged_engine import Executor

logger = logging.getLogger(__name__)

TORCH_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Device(Protocol):
    """Weights come as host tensors and may be dropped by the caller once they have been given."""

    @property
    def device(self) -> torch.device:
        """Where a step's inputs go."""
        ...

    def constant(self, tensor: Tensor) -> Tensor:
        """A weight that is used as it is."""
        ...

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear: ...

    def embedding(self, weight: Tensor) -> Embedding: ...

    def tied_embedding(self, weight: Tensor) -> tuple[Embedding, Linear]:
        """Input embedding and output layer that share one matrix ``[vocab_size, hidden_size]``."""
        ...

    def kv_cache(self, layout: KVLayout) -> Tensor:
        """Zeros of the layout's shape."""
        ...

    def kv_store(self, layout: KVLayout, cache: Tensor) -> KVStore: ...

    def block_mover(self, cache: Tensor, num_slots: int) -> BlockMover:
        """What carries blocks to `num_slots` slots of host memory and back."""
        ...

    def attention(self, cache: Tensor, num_heads: int) -> Attention: ...

    def rows(self, dtype: torch.dtype, head_dim: int, rms_norm_eps: float) -> RowOperations: ...

    def executor(
        self, runner: ModelRunner, model: Transformer, attention: Attention, vocab_size: int, max_rows: int
    ) -> Executor:
        """What runs the steps: `runner`, or what does better with some of them."""
        ...


class CpuDevice:
    """Host memory; weights are packed by oneDNN where torch has it; kernels compiled where numba is there."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._openmp = _openmp()
        self._packs = bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")

    def constant(self, tensor: Tensor) -> Tensor:
        return tensor

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

    def block_mover(self, cache: Tensor, num_slots: int) -> BlockMover:
        return CpuBlockMover(cache, num_slots)

    def attention(self, cache: Tensor, num_heads: int) -> Attention:
        attention = CpuAttention(cache, num_heads)
        if self._openmp is None:
            return attention
        from kvrelay.engine.compiled.attention import CompiledAttention

        return CompiledAttention(self._openmp, cache, num_heads, attention)

    def rows(self, dtype: torch.dtype, head_dim: int, rms_norm_eps: float) -> RowOperations:
        if self._openmp is None:
            return TorchRows(rms_norm_eps)
        from kvrelay.engine.compiled.rows import CompiledRows

        return CompiledRows(self._openmp, dtype, head_dim, rms_norm_eps)

    def executor(
        self, runner: ModelRunner, model: Transformer, attention: Attention, vocab_size: int, max_rows: int
    ) -> Executor:
        return runner


def _openmp() -> OpenMP | None:
    """None: there is no numba, or this torch has no OpenMP; torch's own operations have to do."""
    try:
        from kvrelay.engine.compiled.openmp import OpenMP

        return OpenMP()
    except (ImportError, AttributeError) as error:
        logger.info("no kernels of our own, so decoding is slower: %s", error)
        return None
