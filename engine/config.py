"""How an engine is to be built."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Final

from kvrelay.core.errors import ConfigError
from kvrelay.engine.sim.timing import SimTiming

DEFAULT_KV_BYTES: Final = 1 << 30
_DEVICE: Final = re.compile(r"cpu|cuda(:\d{1,3})?")


class EngineKind(StrEnum):
    """Which engine a node runs."""

    TORCH = "torch"
    SIM = "sim"


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """Bounds of what grammars may cost, as llguidance counts it; beyond them the request is refused or fails.

    The engine's thread compiles a grammar when its request arrives and computes its masks in each step, so
    these bound how long one request may hold up all others. `initial_lexer_fuel` and `max_grammar_size`
    bound compiling; `step_lexer_fuel`, `step_max_items` and `max_items_in_row` one mask; `max_lexer_states`
    the memory of one grammar (1 to 2 kB a state). `num_cached` compiled grammars are kept.

    Raises:
        ConfigError: lists all the faults, one a line.
    """

    num_cached: int = 32
    initial_lexer_fuel: int = 200_000
    step_lexer_fuel: int = 200_000
    step_max_items: int = 10_000
    max_items_in_row: int = 1_000
    max_lexer_states: int = 10_000
    max_grammar_size: int = 200_000

    def __post_init__(self) -> None:
        faults = [
            f"{spec.name} must be from 1 to {2**31 - 1}, got {value!r}"
            for spec in fields(self)
            if type(value := getattr(self, spec.name)) is not int or not 1 <= value < 2**31
        ]
        if faults:
            raise ConfigError("\n".join(faults))


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything that `load_engine` needs, validated when built.

    `model` is the path of a Hugging Face folder (torch) or any name (sim); `served_name` what clients
    call it, by default the folder's or model's name. The KV pool has `num_blocks` blocks, or, where that
    is None, as many as `kv_bytes` hold. Blocks that it evicts go to `host_kv_bytes` of host memory (pinned
    where the device is a GPU) and come back when a prompt has their prefix; 0: they are lost.
    `device` is ``cpu``, ``cuda`` or ``cuda:N``. With
    `random_weights` the folder needs no weights: they are drawn, for measuring the speed of a shape.
    `tensor_parallel_size` GPUs of this host (`device` and those after it), each in a process of its own,
    share the model's heads and the KV pool; on the CPU so many processes do, mostly for trying it out.
    A step computes at most `max_num_batched_tokens`; one that decodes prefills only as much as lets it end
    within `itl_promise_ms`, by what steps have taken so far (and one KV block where not even that fits).
    None: as much as others.
    `max_model_len` None: the model's own, or the KV pool's if that is smaller. `num_threads` None: as
    many as torch takes by itself. `layers_per_group` None: layers are grouped so that one group's KV of a
    chunk is at least 1 MiB, on a GPU 32. `tokenizer` is a folder with what clients turn text into tokens
    with: the model's, unless given; `sim` has none of its own, and with one draws from its vocabulary unless
    `sim_vocab_size` says otherwise.

    Raises:
        ConfigError: lists all the faults, one a line.
    """

    model: str
    engine: EngineKind = EngineKind.TORCH
    served_name: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    random_weights: bool = False
    tensor_parallel_size: int = 1
    num_blocks: int | None = None
    kv_bytes: int = DEFAULT_KV_BYTES
    host_kv_bytes: int = 0
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    itl_promise_ms: float | None = None
    max_model_len: int | None = None
    max_waiting: int = 256
    num_threads: int | None = None
    layers_per_group: int | None = None
    grammar: GrammarLimits = field(default_factory=GrammarLimits)
    tokenizer: str = ""
    sim_vocab_size: int | None = None
    sim_timing: SimTiming = field(default_factory=SimTiming)

    def __post_init__(self) -> None:
        faults = [
            f"{name} must be from {low} to {high}, got {value!r}"
            for name, value, low, high in (
                ("tensor_parallel_size", self.tensor_parallel_size, 1, 64),
                ("num_blocks", self.num_blocks, 2, 1 << 28),
                ("kv_bytes", self.kv_bytes, 1 << 10, 1 << 44),
                ("host_kv_bytes", self.host_kv_bytes, 0, 1 << 44),
                ("block_size", self.block_size, 1, 1024),
                ("max_num_seqs", self.max_num_seqs, 1, 1 << 16),
                ("max_num_batched_tokens", self.max_num_batched_tokens, 1, 1 << 20),
                ("max_model_len", self.max_model_len, 2, 1 << 24),
                ("max_waiting", self.max_waiting, 0, 1 << 20),
                ("num_threads", self.num_threads, 1, 1024),
                ("layers_per_group", self.layers_per_group, 1, 1 << 16),
                ("sim_vocab_size", self.sim_vocab_size, 2, 1 << 24),
            )
            if value is not None and not (type(value) is int and low <= value <= high)
        ]
        promise_ms = self.itl_promise_ms
        if promise_ms is not None and not (type(promise_ms) in (int, float) and 0 < promise_ms <= 60_000):
            faults.append(f"itl_promise_ms must be above 0 and at most 60000, got {promise_ms!r}")
        if self.engine not in tuple(EngineKind):
            faults.append(f"engine must be one of {', '.join(EngineKind)}, got {self.engine!r}")
        if self.dtype not in ("float32", "bfloat16"):
            faults.append(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if not _DEVICE.fullmatch(self.device):
            faults.append(f"device must be cpu, cuda or cuda:N, got {self.device!r}")
        if not self.model:
            faults.append("model must not be empty")
        if not faults and self.max_num_batched_tokens < self.max_num_seqs:
            faults.append("max_num_batched_tokens must be at least max_num_seqs: each step decodes them all")
        if faults:
            raise ConfigError("\n".join(faults))
