"""What the torch engine needs of a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvrelay.core.errors import ConfigError
from kvrelay.core.kv import KVLayout
from kvrelay.engine.attention import Attention
from kvrelay.engine.cuda.attention import CudaAttention
from kvrelay.engine.cuda.block_mover import CudaBlockMover
from kvrelay.engine.cuda.decode_graphs import DecodeGraphs
from kvrelay.engine.cuda.kv_store import CudaKVStore
from kvrelay.engine.cuda.rows import CudaRows
from kvrelay.engine.cuda.runner import CudaRunner
from kvrelay.engine.cuda.sampler import CudaSampler
from kvrelay.engine.device import TORCH_DTYPES
from kvrelay.engine.linear import PlainEmbedding
from kvrelay.engine.model.transformer import Transformer
from kvrelay.engine.model_runner import ModelRunner


class CudaLinear:
    """``y = x @ weight.T + bias`` by cuBLAS."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._transposed = weight.t()
        self._bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        if self._bias is None:
            return torch.mm(rows, self._transposed)
        return torch.addmm(self._bias, rows, self._transposed)

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        """Adds in place."""
        result = residual.addmm_(rows, self._transposed)
        return result if self._bias is None else result.add_(self._bias)

    def replace(self, residual: Tensor, rows: Tensor) -> Tensor:
        """In place."""
        result = torch.mm(rows, self._transposed, out=residual)
        return result if self._bias is None else result.add_(self._bias)


class CudaDevice:
    """See `kvrelay.engine.device.Device`: of rank `rank` where that of rank 0 is `name`.

    Raises:
        ConfigError: there is no such device here.
    """

    def __init__(self, name: str, rank: int, max_model_len: int, block_size: int) -> None:
        if not torch.cuda.is_available():
            raise ConfigError(f"device {name!r}: this PyTorch ({torch.__version__}) sees no CUDA device")
        index = (torch.device(name).index or 0) + rank
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"device {name!r}, rank {rank}: there are {torch.cuda.device_count()} CUDA devices"
            )
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(index)
        self._max_blocks = -(-max_model_len // block_size)

    def constant(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> CudaLinear:
        return CudaLinear(self.constant(weight), None if bias is None else self.constant(bias))

    def embedding(self, weight: Tensor) -> PlainEmbedding:
        return PlainEmbedding(self.constant(weight))

    def tied_embedding(self, weight: Tensor) -> tuple[PlainEmbedding, CudaLinear]:
        shared = self.constant(weight)
        return PlainEmbedding(shared), CudaLinear(shared, None)

    def kv_cache(self, layout: KVLayout, memory: Tensor | None = None) -> Tensor:
        shape = (
            layout.num_layers,
            2,
            layout.num_blocks,
            layout.block_size,
            layout.num_kv_heads,
            layout.head_dim,
        )
        assert memory is None, "only host memory is given from outside"
        return torch.zeros(shape, dtype=TORCH_DTYPES[layout.dtype], device=self.device)

    def kv_store(self, layout: KVLayout, caches: Sequence[Tensor]) -> CudaKVStore:
        return CudaKVStore(layout, caches)

    def block_mover(self, cache: Tensor, num_slots: int) -> CudaBlockMover:
        return CudaBlockMover(cache, num_slots)

    def attention(self, cache: Tensor, num_heads: int) -> CudaAttention:
        return CudaAttention(cache, num_heads, self._max_blocks)

    def decode_graphs(
        self, model: Transformer, attention: Attention, vocab_size: int, max_rows: int, block_size: int
    ) -> DecodeGraphs:
        assert isinstance(attention, CudaAttention)
        return DecodeGraphs(
            model,
            attention,
            self.device,
            max_rows=max_rows,
            max_blocks=self._max_blocks,
            block_size=block_size,
            sampler=CudaSampler(max_rows, vocab_size, self.device),
        )

    def executor(self, runner: ModelRunner, graphs: DecodeGraphs | None) -> CudaRunner:
        assert graphs is not None
        assert isinstance(runner.kv, CudaKVStore)
        return CudaRunner(runner, graphs, runner.kv)

    def rows(self, dtype: torch.dtype, head_dim: int, rms_norm_eps: float) -> CudaRows:
        return CudaRows(rms_norm_eps)
