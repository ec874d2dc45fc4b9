"""The seam between the torch engine and the device that it runs on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch import Tensor

from kvrelay.core.kv import KVLayout, KVStore
from kvrelay.engine.attention import Attention
from kvrelay.engine.block_mover import BlockMover, CpuBlockMover
from kvrelay.engine.cpu_attention import CpuAttention
from kvrelay.engine.cuda.kv_store import CudaKVStore
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
    from kvrelay.engine.cuda.decode_graphs import DecodeGraphs
    from kvrelay.engine.executor import Executor
    from kvrelay.engine.model.transformer import Transformer
    from kvrelay.engine.model_runner import ModelRunner

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

    def kv_cache(self, layout: KVLayout, memory: Tensor | None = None) -> Tensor:
        """Zeros of the layout's shape, in `memory` (uint8 zeros) where that is given."""
        ...

    def kv_store(self, layout: KVLayout, caches: Sequence[Tensor]) -> KVStore:
        """Of all ranks' caches, by rank; `layout` is the whole node's."""
        ...

    def block_mover(self, cache: Tensor, num_slots: int) -> BlockMover:
        """What carries blocks to `num_slots` slots of host memory and back."""
        ...

    def attention(self, cache: Tensor, num_heads: int) -> Attention: ...

    def rows(self, dtype: torch.dtype, head_dim: int, rms_norm_eps: float) -> RowOperations: ...

    def decode_graphs(
        self, model: Transformer, attention: Attention, vocab_size: int, max_rows: int, block_size: int
    ) -> DecodeGraphs | None:
        """Not captured yet; None: the device has none."""
        ...

    def executor(self, runner: ModelRunner, graphs: DecodeGraphs | None) -> Executor:
        """What runs the steps: `runner`, or what does better with some of them."""
        ...


class CpuDevice:
    """Host memory; weights are packed by oneDNN where torch has it; kernels compiled where numba is there."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._openmp = _openmp()
        self._packs = {dtype: _packs(dtype) for dtype in TORCH_DTYPES.values()}

    def constant(self, tensor: Tensor) -> Tensor:
        return tensor

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return PackedLinear(weight, bias) if self._packs[weight.dtype] else PlainLinear(weight, bias)

    def embedding(self, weight: Tensor) -> Embedding:
        return PlainEmbedding(weight)

    def tied_embedding(self, weight: Tensor) -> tuple[Embedding, Linear]:
        if self._packs[weight.dtype]:
            linear = PackedLinear(weight)
            embedding = PackedEmbedding.try_build(linear, weight)
            if embedding is not None:
                return embedding, linear
        return PlainEmbedding(weight), PlainLinear(weight)

    def kv_cache(self, layout: KVLayout, memory: Tensor | None = None) -> Tensor:
        shape = (
            layout.num_layers,
            2,
            layout.num_blocks,
            layout.block_size,
            layout.num_kv_heads,
            layout.head_dim,
        )
        dtype = TORCH_DTYPES[layout.dtype]
        return torch.zeros(shape, dtype=dtype) if memory is None else memory.view(dtype).view(shape)

    def kv_store(self, layout: KVLayout, caches: Sequence[Tensor]) -> KVStore:
        if len(caches) > 1:
            return CudaKVStore(layout, caches)
        num_slots = layout.num_blocks * layout.block_size
        slots = caches[0].view(torch.uint8).view(layout.num_layers, 2, num_slots, -1)
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

    def decode_graphs(
        self, model: Transformer, attention: Attention, vocab_size: int, max_rows: int, block_size: int
    ) -> DecodeGraphs | None:
        return None

    def executor(self, runner: ModelRunner, graphs: DecodeGraphs | None) -> Executor:
        return runner


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this type here; for bfloat16 not every CPU will do."""
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    try:
        PackedLinear(torch.zeros((1, 1), dtype=dtype))
    except RuntimeError as error:
        logger.info("weights of %s are not packed, so decoding is slower: %s", dtype, error)
        return False
    return True


def _openmp() -> OpenMP | None:
    """None: there is no numba, or this torch has no OpenMP; torch's own operations have to do."""
    try:
        from kvrelay.engine.compiled.openmp import OpenMP

        return OpenMP()
    except (ImportError, AttributeError) as error:
        logger.info("no kernels of our own, so decoding is slower: %s", error)
        return None
