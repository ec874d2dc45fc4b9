"""Builds the torch engine: a Hugging Face folder, run by our own paged-KV code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from kvrelay.core.errors import ConfigError
from kvrelay.core.kv import KVFingerprint, KVLayout
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.device import TORCH_DTYPES, CpuDevice, Device
from kvrelay.engine.grammar import GrammarCompiler
from kvrelay.engine.host_tier import num_host_blocks
from kvrelay.engine.interface import EngineInfo
from kvrelay.engine.model.config import ModelConfig, read_model_config
from kvrelay.engine.model.loader import load_weights
from kvrelay.engine.model.random_weights import RandomWeights
from kvrelay.engine.model.transformer import Transformer
from kvrelay.engine.model.weights import WeightFolder, model_digest
from kvrelay.engine.model_runner import ModelRunner
from kvrelay.engine.paged_engine import PagedEngine
from kvrelay.engine.scheduler import SchedulerLimits

OnProgress = Callable[[float, str], None]


class TorchEngine(PagedEngine):
    """The `torch` engine. It uses torch's process-wide thread count, which `num_threads` sets.

    Raises:
        ConfigError: there is no such model, it needs something that this engine lacks, or the KV pool is
            too small for it.
    """

    def __init__(self, config: EngineConfig, on_progress: OnProgress | None = None) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        folder = Path(config.model)
        model_config = read_model_config(folder)
        layout = kv_layout(model_config, config)
        num_host = num_host_blocks(config.host_kv_bytes, layout.total_bytes // layout.num_blocks)
        max_model_len = _max_model_len(model_config, config, layout)
        name = config.served_name or folder.resolve().name
        device = _open_device(config, max_model_len)
        with torch.inference_mode():
            files = _weight_files(folder, config, device, name, on_progress)
            weights = load_weights(files, model_config, device, TORCH_DTYPES[config.dtype], max_model_len)
            cache = device.kv_cache(layout)
            mover = device.block_mover(cache, num_host) if num_host else None
            attention = device.attention(cache, model_config.num_heads)
            rows = device.rows(cache.dtype, model_config.head_dim, model_config.rms_norm_eps)
        vocab_size, eos_token_ids = model_config.vocab_size, model_config.eos_token_ids
        model = Transformer(model_config, weights, attention, rows)
        runner = ModelRunner(
            model,
            attention,
            device.kv_store(layout, cache),
            GrammarCompiler(folder, vocab_size, eos_token_ids, config.grammar),
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            device=device.device,
            mover=mover,
        )
        executor = device.executor(runner, model, attention, vocab_size, config.max_num_seqs)
        digest = "random" if config.random_weights else model_digest(folder)
        info = _engine_info(model_config, config, layout, max_model_len, name, digest)
        limits = SchedulerLimits(config.max_num_seqs, config.max_num_batched_tokens, config.max_waiting)
        super().__init__(
            info,
            executor,
            limits,
            spread_blocks=True,
            layers_per_group=config.layers_per_group,
            num_host_blocks=num_host,
        )


def _open_device(config: EngineConfig, max_model_len: int) -> Device:
    if config.device == "cpu":
        return CpuDevice()
    try:
        from kvrelay.engine.cuda.device import CudaDevice
    except ImportError as error:
        raise ConfigError(f"device {config.device!r} needs Triton: {error}") from error
    return CudaDevice(config.device, max_model_len, config.block_size)


def _weight_files(
    folder: Path, config: EngineConfig, device: Device, name: str, on_progress: OnProgress | None
) -> WeightFolder | RandomWeights:
    if config.random_weights:
        return RandomWeights(device.device)
    return WeightFolder(folder, _byte_counter(WeightFolder(folder).num_bytes, name, on_progress))


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
    return KVLayout(
        layout.num_layers,
        num_blocks,
        layout.block_size,
        layout.num_kv_heads,
        layout.head_dim,
        layout.dtype,
        layout.dtype_bytes,
    )


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


def _engine_info(
    model_config: ModelConfig,
    config: EngineConfig,
    layout: KVLayout,
    max_model_len: int,
    name: str,
    digest: str,
) -> EngineInfo:
    return EngineInfo(
        engine="torch",
        model=name,
        fingerprint=KVFingerprint(
            model=f"{model_config.family}-{digest}",
            dtype=config.dtype,
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            rope=model_config.rope.digest,
        ),
        vocab_size=model_config.vocab_size,
        max_model_len=max_model_len,
        num_blocks=layout.num_blocks,
        block_size=layout.block_size,
        max_num_seqs=config.max_num_seqs,
        eos_token_ids=model_config.eos_token_ids,
    )
