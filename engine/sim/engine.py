"""Builds the simulated engine."""

from __future__ import annotations

import time
from hashlib import sha256
from pathlib import Path
from typing import Final

from kvrelay.core.errors import ConfigError
from kvrelay.core.kv import KVFingerprint, KVLayout
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.host_tier import num_host_blocks
from kvrelay.engine.interface import EngineInfo
from kvrelay.engine.paged_engine import PagedEngine, ReadClock
from kvrelay.engine.sim.executor import SimExecutor, Sleep
from kvrelay.engine.step_plan import SchedulerLimits

NUM_LAYERS: Final = 4
DEFAULT_MAX_MODEL_LEN: Final = 8192
DEFAULT_VOCAB_SIZE: Final = 32_000
TOKEN_BYTES: Final = NUM_LAYERS * 16


class SimEngine(PagedEngine):
    """The `sim` engine: `sleep` is called, in the engine's thread, for the time that each step would take.

    `read_clock` tells the time that `sleep` passes.
    """

    def __init__(
        self, config: EngineConfig, *, sleep: Sleep = time.sleep, read_clock: ReadClock = time.perf_counter
    ) -> None:
        num_blocks = config.num_blocks or max(2, config.kv_bytes // (TOKEN_BYTES * config.block_size))
        max_model_len = min(config.max_model_len or DEFAULT_MAX_MODEL_LEN, num_blocks * config.block_size)
        layout = KVLayout(NUM_LAYERS, num_blocks, config.block_size, 1, 8, "uint8", 1)
        num_host = num_host_blocks(config.host_kv_bytes, TOKEN_BYTES * config.block_size)
        vocab_size = config.sim_vocab_size or _tokenizer_vocab_size(config.tokenizer) or DEFAULT_VOCAB_SIZE
        executor = SimExecutor(
            layout,
            config.sim_timing,
            sleep,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            num_host_blocks=num_host,
        )
        model = f"sim-{sha256(f'{config.model} {vocab_size}'.encode()).hexdigest()[:16]}"
        info = EngineInfo(
            engine="sim",
            model=config.served_name or config.model,
            fingerprint=KVFingerprint(model, layout.dtype, NUM_LAYERS, 1, 8, "none"),
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            eos_token_ids=(0,),
        )
        limits = SchedulerLimits(config.max_num_seqs, config.max_num_batched_tokens, config.max_waiting)
        super().__init__(
            info,
            executor,
            limits,
            layers_per_group=config.layers_per_group or NUM_LAYERS // 2,
            itl_promise_ms=config.itl_promise_ms,
            num_host_blocks=num_host,
            read_clock=read_clock,
        )


def _tokenizer_vocab_size(folder: str) -> int:
    """0: no tokenizer is given.

    Raises:
        ConfigError: the folder holds none.
    """
    if not folder:
        return 0
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json"
    try:
        return int(Tokenizer.from_file(str(file)).get_vocab_size(with_added_tokens=True))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"tokenizer {file} can't be read: {error}", field="tokenizer") from error
