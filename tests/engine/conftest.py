"""Tiny engines, and what drives them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.config import EngineConfig, EngineKind
from kvrelay.engine.executor import DrawFailed, DrawnToken, LayerDone
from kvrelay.engine.interface import Engine, KVReady, SequenceFailure, SequenceKey, SequenceOutput
from kvrelay.engine.paged_engine import PagedEngine
from kvrelay.engine.sequence import Chunk, LiveSequence
from kvrelay.engine.sim.engine import SimEngine
from kvrelay.engine.sim.executor import SimExecutor
from kvrelay.engine.sim.timing import INSTANT

BuildEngine = Callable[..., PagedEngine]

TINY_SHAPE = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    import torch

    torch.set_num_threads(1)


def save_tiny_model(folder: Path, family: str, **changes: object) -> Path:
    """A random model whose greedy output varies, as a Hugging Face folder."""
    import torch
    import transformers

    config_type = getattr(transformers, f"{family}Config")
    model_type = getattr(transformers, f"{family}ForCausalLM")
    torch.manual_seed(20260101)
    model = model_type(config_type(**{**TINY_SHAPE, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def save_model() -> Callable[..., Path]:
    return save_tiny_model


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "Llama")


@pytest.fixture(params=["torch", "sim", "ahead"])
def build_engine(request: pytest.FixtureRequest) -> BuildEngine:
    """``build_engine(**changes of EngineConfig)``, for each kind of engine."""
    if request.param == "sim":
        return build_sim_engine
    if request.param == "ahead":
        return build_ahead_engine
    folder = str(request.getfixturevalue("tiny_llama"))

    def build(**changes: object) -> PagedEngine:
        from kvrelay.engine.torch_engine import TorchEngine

        return TorchEngine(EngineConfig(model=folder, **{**SMALL, **changes}))  # type: ignore[arg-type]

    return build


SMALL: dict[str, object] = {
    "num_blocks": 64,
    "block_size": 4,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "max_waiting": 16,
}


class VirtualTime:
    """Passes when an engine sleeps."""

    now_s = 0.0

    def sleep(self, step_s: float) -> None:
        self.now_s += step_s

    def read(self) -> float:
        return self.now_s


def build_sim_engine(**changes: object) -> PagedEngine:
    time = VirtualTime()
    settings = {"model": "m", "sim_vocab_size": 211, "sim_timing": INSTANT, **SMALL, **changes}
    config = EngineConfig(engine=EngineKind.SIM, **settings)  # type: ignore[arg-type]
    return SimEngine(config, sleep=time.sleep, read_clock=time.read)


@pytest.fixture
def build_sim() -> BuildEngine:
    return build_sim_engine


class LateSim(SimExecutor):
    """Computes a launched step as late as it may: when its results are asked for, as a device would that has
    a step queued behind another. Until then no block that it writes or reads may be free for others.

    A prefill step takes `num_parts` turns. `log` has what was launched and what was read, by keys.
    """

    engine: PagedEngine
    num_ahead = 0
    num_prefills_ahead = 0
    num_under_way = 0
    num_parts = 1
    log: list[tuple[str, tuple[str, ...]]]

    def note(self, what: str, chunks: Sequence[Chunk]) -> None:
        self.log.append((what, tuple(chunk.sequence.key for chunk in chunks)))

    def can_launch(self, chunks: Sequence[Chunk]) -> bool:
        if any(
            chunk.samples and chunk.sequence.request.sampling.num_logprobs is not None for chunk in chunks
        ):
            return False
        if all(chunk.is_prefill for chunk in chunks):
            return bool(chunks)
        return all(chunk.num_tokens == 1 and not chunk.is_prefill for chunk in chunks)

    def launch(self, chunks: Sequence[Chunk], layer_done: LayerDone | None) -> LateStep:
        self.num_ahead += any(chunk.start >= len(chunk.sequence.token_ids) for chunk in chunks)
        self.num_prefills_ahead += self.num_under_way > 0 and chunks[0].is_prefill
        self.num_under_way += 1
        assert self.num_under_way <= 2, "at most one step ahead"
        self.note("launch", chunks)
        return LateStep(self, chunks, layer_done)


class LateStep:
    def __init__(self, executor: LateSim, chunks: Sequence[Chunk], layer_done: LayerDone | None) -> None:
        self.chunks = chunks
        self._layer_done = layer_done
        self._executor = executor
        self._tables = [list(chunk.sequence.block_table) for chunk in chunks]
        self._num_parts_left = executor.num_parts if chunks[0].is_prefill else 1

    def has_time(self) -> bool:
        return True

    def advance(self) -> bool:
        self._num_parts_left -= 1
        return self._num_parts_left == 0

    def results(self) -> list[DrawnToken | DrawFailed]:
        pool = self._executor.engine._scheduler.pool
        for chunk, table in zip(self.chunks, self._tables, strict=True):
            used = table[: -(-chunk.end // self._executor.kv.layout.block_size)]
            assert all(pool._num_references[block] > 0 for block in used), "a block was freed too early"
        live = [chunk for chunk in self.chunks if chunk.sequence.block_table]
        sampled = [chunk for chunk in live if chunk.samples]
        drawn = dict(zip(map(id, sampled), self._executor.execute(live, self._layer_done), strict=True))
        self._executor.num_under_way -= 1
        self._executor.note("read", self.chunks)
        return [drawn.get(id(chunk), DrawnToken(0)) for chunk in self.chunks if chunk.samples]


def build_ahead_engine(**changes: object) -> PagedEngine:
    """The simulated engine, run one step ahead."""
    engine = build_sim_engine(**changes)
    executor = engine._executor
    executor.__class__ = LateSim
    assert isinstance(executor, LateSim)
    executor.engine = engine
    executor.log = []
    engine._ahead_executor = executor
    return engine


@pytest.fixture
def build_ahead() -> BuildEngine:
    return build_ahead_engine


class ReadingSim(LateSim):
    """A `LateSim` that reads, as attention would, all KV that is there already of what it computes."""

    def execute(
        self, chunks: Sequence[Chunk], layer_done: LayerDone | None
    ) -> Sequence[DrawnToken | DrawFailed]:
        for chunk in chunks:
            assert self.wrong_kv(chunk.sequence, chunk.start) is None
        return super().execute(chunks, layer_done)

    def wrong_kv(self, sequence: LiveSequence, num_tokens: int) -> str | None:
        return self.check_received(sequence.token_ids[:num_tokens], sequence.block_table)


@pytest.fixture(params=["in_step", "ahead"])
def build_reading(request: pytest.FixtureRequest) -> BuildEngine:
    """The simulated engine, which stops at the first wrong KV that it reads; also run one step ahead."""

    def build(**changes: object) -> PagedEngine:
        engine = build_ahead_engine(**changes)
        engine._executor.__class__ = ReadingSim
        if request.param == "in_step":
            engine._ahead_executor = None
        return engine

    return build


class Driver:
    """Steps one engine, checks its invariants after every step, and collects what it delivers."""

    def __init__(self, engine: PagedEngine) -> None:
        self.engine = engine
        self.outputs: dict[str, list[SequenceOutput]] = {}
        self.failures: list[SequenceFailure] = []
        self.ready: list[KVReady] = []
        engine.set_kv_ready_listener(self.ready.append)

    def step(self) -> list[SequenceOutput]:
        result = self.engine.step()
        self.engine.check()
        for output in result.outputs:
            self.outputs.setdefault(output.key, []).append(output)
        self.failures += result.failures
        return list(result.outputs)

    def run(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not self.engine.has_work():
                return
            self.step()
        raise AssertionError(f"still busy after {max_steps} steps")

    def tokens(self, key: str) -> list[int]:
        return [output.token_id for output in self.outputs.get(key, [])]

    def generate(self, *requests: TokenRequest) -> list[list[int]]:
        """Submit all at once, run to the end, return each one's new tokens."""
        keys = [f"generate-{len(self.outputs)}-{index}" for index in range(len(requests))]
        for key, request in zip(keys, requests, strict=True):
            self.engine.submit(request, SequenceKey(key))
        self.run()
        assert not self.failures
        return [self.tokens(key) for key in keys]


@pytest.fixture
def drive() -> type[Driver]:
    return Driver


def make_request(
    prompt: Iterable[int], *, outputs: Iterable[int] = (), salt: bytes = b"", **sampling: object
) -> TokenRequest:
    prompt_ids = tuple(prompt)
    settings: dict[str, object] = {"max_tokens": 8, "ignore_eos": True, **sampling}
    params = SamplingParams(**settings)  # type: ignore[arg-type]
    return TokenRequest(prompt_ids + tuple(outputs), len(prompt_ids), params, salt)


@pytest.fixture
def request_of() -> Callable[..., TokenRequest]:
    return make_request


def make_prompt(length: int, variant: int = 0) -> list[int]:
    """`length` token ids of the tiny vocabulary; prompts of one variant share their beginning."""
    state, ids = 12345 + 7919 * variant, []
    for _ in range(length):
        state = (state * 1103515245 + 12345) % 2**31
        ids.append(3 + state // 65536 % 208)
    return ids


@pytest.fixture
def prompt_of() -> Callable[..., list[int]]:
    return make_prompt


def hand_off(
    source: Engine, target: Engine, key: SequenceKey, request: TokenRequest, ready: list[KVReady]
) -> None:
    """Move what `ready` reports from `source` into a reservation on `target`, as a transfer would."""
    reservation = target.reserve(request, key)
    for item in ready:
        start = max(item.tokens.start, reservation.num_cached_tokens)
        if start >= item.tokens.stop:
            continue
        tokens = range(start, item.tokens.stop)
        staging = source.kv.allocate_staging(source.kv.layout.token_bytes * len(tokens) + 64)
        sent = source.kv.gather(item.block_table, item.layers, tokens, staging, 64).wait()
        received = target.kv.scatter(reservation.block_table, item.layers, tokens, staging, 64).wait()
        assert sent == received == len(item.layers) * len(tokens) * source.kv.layout.token_bytes_per_layer


@pytest.fixture
def move_kv() -> Callable[..., None]:
    return hand_off


def read_json(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text()))
