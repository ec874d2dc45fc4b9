"""One rank's part of a torch engine: all of it, unless there is tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kvrelay.core.errors import ConfigError
from kvrelay.core.kv import KVLayout
from kvrelay.engine.block_mover import BlockMover
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.device import TORCH_DTYPES, CpuDevice, Device
from kvrelay.engine.forward_pass import ForwardPass
from kvrelay.engine.host_tier import BlockCopy, num_host_blocks
from kvrelay.engine.model.config import ModelConfig, read_model_config
from kvrelay.engine.model.loader import load_weights
from kvrelay.engine.model.parallel import Collectives, Shard
from kvrelay.engine.model.random_weights import RandomWeights
from kvrelay.engine.model.transformer import Transformer
from kvrelay.engine.model.weights import WeightFolder

OnProgress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What all ranks agree on before anything is loaded; `layout` is the whole node's."""

    config: EngineConfig
    model_config: ModelConfig
    layout: KVLayout
    max_model_len: int

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.config.served_name or Path(self.config.model).resolve().name

    @property
    def num_host_blocks(self) -> int:
        """What `host_kv_bytes` hold of all ranks' blocks."""
        return num_host_blocks(self.config.host_kv_bytes, self.layout.total_bytes // self.layout.num_blocks)

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.config.dtype]


def plan_engine(config: EngineConfig) -> EnginePlan:
    """Read the model's configuration and fit the KV pool to it.

    Raises:
        ConfigError: there is no such model, it needs something that this engine lacks, it can't be divided
            between so many ranks, or the KV pool is too small for it.
    """
    model_config = read_model_config(Path(config.model))
    Shard(0, config.tensor_parallel_size).model(model_config)
    layout = kv_layout(model_config, config)
    return EnginePlan(config, model_config, layout, _max_model_len(model_config, config, layout))


def open_device(plan: EnginePlan, rank: int) -> Device:
    """The device of one rank: the first rank's is the one that is configured, the others' follow it.

    Raises:
        ConfigError: there is no such device.
    """
    config = plan.config
    if config.device == "cpu":
        if config.tensor_parallel_size > 1 and config.num_threads is None:
            torch.set_num_threads(max(1, torch.get_num_threads() // config.tensor_parallel_size))
        return CpuDevice()
    try:
        from kvrelay.engine.cuda.device import CudaDevice
    except ImportError as error:
        raise ConfigError(f"device {config.device!r} needs Triton: {error}") from error
    return CudaDevice(config.device, rank, plan.max_model_len, config.block_size)


class TorchRank:
    """Weights, KV cache and forward pass of one rank, on its device.

    `memory` ``[bytes of the rank's cache]``: where the cache is to be; None: the device finds some.

    Raises:
        ConfigError: the weights don't fit the configuration.
    """

    def __init__(
        self,
        plan: EnginePlan,
        device: Device,
        collectives: Collectives | None = None,
        memory: Tensor | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        shard = Shard() if collectives is None else collectives.shard
        self.device = device
        self._plan = plan
        part = shard.model(plan.model_config)
        with torch.inference_mode():
            files = _weight_files(plan, device, on_progress)
            weights = load_weights(
                files, plan.model_config, device, plan.dtype, plan.max_model_len, collectives
            )
            self.cache = device.kv_cache(shard.layout(plan.layout), memory)
            num_host = plan.num_host_blocks
            self.mover = _block_mover(device, self.cache, num_host, collectives) if num_host else None
            self.attention = device.attention(self.cache, part.num_heads)
            rows = device.rows(self.cache.dtype, part.head_dim, part.rms_norm_eps)
        self.model = Transformer(part, weights, self.attention, rows, is_sharded=shard.size > 1)
        self.forward_pass = ForwardPass(
            self.model,
            self.attention,
            block_size=plan.layout.block_size,
            device=device.device,
            max_step_tokens=plan.config.max_num_batched_tokens,
            max_model_len=plan.max_model_len,
        )


class _MeetingMover:
    """Moves a rank's part of blocks. Rank 0 alone knows what comes behind a move, and for which transfer:
    behind the ranks' meeting it may take all parts for moved."""

    def __init__(self, mover: BlockMover, collectives: Collectives) -> None:
        self._mover = mover
        self._collectives = collectives

    def move(self, copies: Sequence[BlockCopy]) -> None:
        self._mover.move(copies)
        self._collectives.barrier()


def _block_mover(
    device: Device, cache: Tensor, num_slots: int, collectives: Collectives | None
) -> BlockMover:
    mover = device.block_mover(cache, num_slots)
    return mover if collectives is None else _MeetingMover(mover, collectives)


def _weight_files(
    plan: EnginePlan, device: Device, on_progress: OnProgress | None
) -> WeightFolder | RandomWeights:
    if plan.config.random_weights:
        return RandomWeights(device.device)
    folder = Path(plan.config.model)
    return WeightFolder(folder, _byte_counter(WeightFolder(folder).num_bytes, plan.name, on_progress))


def kv_layout(model_config: ModelConfig, config: EngineConfig) -> KVLayout:
    """The KV pool's shape: `num_blocks` as given, or as many as `kv_bytes` hold.

    Raises:
        ConfigError: `kv_bytes` hold fewer than two blocks.
    """
    layout = KVLayout(
        num_layers=model_config.num_layers,
        num_blocks=1,
        block_size=config.block_size,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        dtype=config.dtype,
        dtype_bytes=TORCH_DTYPES[config.dtype].itemsize,
    )
    num_blocks = config.num_blocks or config.kv_bytes // layout.total_bytes
    if num_blocks < 2:
        raise ConfigError(f"kv_bytes {config.kv_bytes} hold no two KV blocks of {layout.total_bytes} bytes")
    return replace(layout, num_blocks=num_blocks)


def _max_model_len(model_config: ModelConfig, config: EngineConfig, layout: KVLayout) -> int:
    """What is asked for, within what the model and the KV pool can do."""
    wanted = config.max_model_len or model_config.max_model_len
    if wanted > model_config.max_model_len:
        raise ConfigError(
            f"max_model_len {wanted} is beyond the {model_config.max_model_len} tokens of the model"
            " (its max_position_embeddings or sliding_window)"
        )
    return min(wanted, layout.num_blocks * layout.block_size)


def _byte_counter(
    total_bytes: int, name: str, on_progress: OnProgress | None
) -> Callable[[int], None] | None:
    """Turns bytes read into calls of `on_progress`."""
    if on_progress is None:
        return None
    report = on_progress
    num_read = 0

    def count(num_bytes: int) -> None:
        nonlocal num_read
        num_read += num_bytes
        report(min(1.0, num_read / total_bytes), f"loading {name}")

    return count
