"""Builds the torch engine: a Hugging Face folder, run by our own paged-KV code."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

import torch

from kvrelay.core.kv import KVFingerprint
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.device import Device
from kvrelay.engine.executor import Executor
from kvrelay.engine.grammar import GrammarCompiler
from kvrelay.engine.interface import EngineInfo
from kvrelay.engine.model.parallel import Shard
from kvrelay.engine.model.weights import model_digest
from kvrelay.engine.model_runner import ModelRunner
from kvrelay.engine.paged_engine import PagedEngine
from kvrelay.engine.step_plan import SchedulerLimits
from kvrelay.engine.tensor_parallel.collectives import TorchCollectives
from kvrelay.engine.tensor_parallel.followers import Followers
from kvrelay.engine.torch_rank import EnginePlan, OnProgress, TorchRank, open_device, plan_engine

_LEAVE_TIMEOUT_S: Final = 5.0


class TorchEngine(PagedEngine):
    """The `torch` engine. It uses torch's process-wide thread count, which `num_threads` sets.

    With `tensor_parallel_size` above 1 it is rank 0, and starts a process for each of the others.

    Raises:
        ConfigError: there is no such model, it needs something that this engine lacks, or the KV pool is
            too small for it.
    """

    def __init__(self, config: EngineConfig, on_progress: OnProgress | None = None) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        plan = plan_engine(config)
        device = open_device(plan, 0)
        self._ranks = _Ranks(plan, device) if config.tensor_parallel_size > 1 else None
        try:
            executor = _build_executor(plan, device, self._ranks, on_progress)
        except BaseException:
            self.close()
            raise
        limits = SchedulerLimits(config.max_num_seqs, config.max_num_batched_tokens, config.max_waiting)
        super().__init__(
            _engine_info(plan),
            executor,
            limits,
            spread_blocks=True,
            layers_per_group=config.layers_per_group,
            itl_promise_ms=config.itl_promise_ms,
            num_host_blocks=plan.num_host_blocks,
        )

    def close(self) -> None:
        """End the processes of the other ranks; the engine can't be used any more."""
        if self._ranks is not None:
            self._ranks.close()


class _Ranks:
    """The other ranks, and what this one does together with them."""

    def __init__(self, plan: EnginePlan, device: Device) -> None:
        self.followers = Followers(plan)
        try:
            self.followers.wait_started()
            self.collectives = TorchCollectives(
                Shard(0, plan.config.tensor_parallel_size),
                device.device,
                self.followers.store,
                dtype=plan.dtype,
                hidden_size=plan.model_config.hidden_size,
                max_rows=plan.config.max_num_batched_tokens,
            )
        except BaseException:
            self.followers.close()
            raise

    def close(self) -> None:
        self.followers.close()
        # A step that was cut off may leave a sum that never ends: then the process's end has to do.
        leaving = threading.Thread(target=self.collectives.close, name="leave-ranks", daemon=True)
        leaving.start()
        leaving.join(_LEAVE_TIMEOUT_S)


def _build_executor(
    plan: EnginePlan, device: Device, ranks: _Ranks | None, on_progress: OnProgress | None
) -> Executor:
    vocab_size, eos_token_ids = plan.model_config.vocab_size, plan.model_config.eos_token_ids
    send = None if ranks is None else ranks.followers.send
    rank = TorchRank(plan, device, None if ranks is None else ranks.collectives, on_progress=on_progress)
    caches = [rank.cache] if ranks is None else [rank.cache, *ranks.followers.wait_loaded(rank.cache)]
    graphs = device.decode_graphs(
        rank.model, rank.attention, vocab_size, plan.config.max_num_seqs, plan.layout.block_size
    )
    if graphs is not None:
        graphs.broadcast = send
        graphs.capture()
    runner = ModelRunner(
        rank.forward_pass,
        device.kv_store(plan.layout, caches),
        GrammarCompiler(Path(plan.config.model), vocab_size, eos_token_ids, plan.config.grammar),
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        mover=rank.mover,
        broadcast=send,
    )
    return device.executor(runner, graphs)


def _engine_info(plan: EnginePlan) -> EngineInfo:
    model_config, config, layout = plan.model_config, plan.config, plan.layout
    digest = "random" if config.random_weights else model_digest(Path(config.model))
    return EngineInfo(
        engine="torch",
        model=plan.name,
        fingerprint=KVFingerprint(
            model=f"{model_config.family}-{digest}",
            dtype=config.dtype,
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            rope=model_config.rope.digest,
        ),
        vocab_size=model_config.vocab_size,
        max_model_len=plan.max_model_len,
        num_blocks=layout.num_blocks,
        block_size=layout.block_size,
        max_num_seqs=config.max_num_seqs,
        eos_token_ids=model_config.eos_token_ids,
    )
