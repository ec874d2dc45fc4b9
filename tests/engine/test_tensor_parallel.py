"""Several processes as one engine, on the CPU: the tokens of one process, and what happens to a lost rank."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrelay.core.errors import ConfigError, EngineFailed
from kvrelay.core.request import Prefix, TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.interface import SequenceKey
from kvrelay.engine.model.parallel import Shard, vocabulary_part
from kvrelay.engine.torch_engine import TorchEngine

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 257,  # does not divide: the last rank's part is padded
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "eos_token_id": 2,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path


@pytest.fixture
def num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@contextmanager
def engine_of(folder: Path, num_ranks: int, **changes: Any) -> Iterator[TorchEngine]:
    settings: dict[str, Any] = {
        "random_weights": True,
        "num_blocks": 60,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "num_threads": 1,
        **changes,
    }
    engine = TorchEngine(EngineConfig(str(folder), tensor_parallel_size=num_ranks, **settings))
    try:
        yield engine
    finally:
        engine.close()


def ask(engine: TorchEngine, index: int, *, num_tokens: int = 12) -> None:
    """Prompts of all lengths, one of three drawn at random, one with what only the reference draws."""
    prompt = tuple((7 * index + 3 * position) % 250 for position in range(3 + 17 * index % 90))
    sampling = SamplingParams(
        max_tokens=num_tokens,
        temperature=(0.0, 0.9, 0.0)[index % 3],
        seed=index,
        top_k=(0, 0, 0, 20)[index % 4],
        ignore_eos=True,
    )
    engine.submit(TokenRequest(prompt, len(prompt), sampling), SequenceKey(str(index)))


def tokens(engine: TorchEngine) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    while engine.has_work():
        step = engine.step()
        assert not step.failures
        for output in step.outputs:
            found.setdefault(output.key, []).append(output.token_id)
    engine.check()
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["own output layer", "tied output layer"])
def test_ranks_give_the_tokens_of_one(folder: Path, tied: bool, num_threads: None) -> None:
    (folder / "config.json").write_text(json.dumps({**SHAPE, "tie_word_embeddings": tied}))
    found = []
    for num_ranks in (1, 2):
        with engine_of(folder, num_ranks) as engine:
            for index in range(9):
                ask(engine, index)
            found.append(tokens(engine))
            assert engine.load().num_held_blocks == 0
    assert len(found[0]) == 9
    assert found[1] == found[0]


def test_every_rank_brings_its_part_back_from_the_host(folder: Path, num_threads: None) -> None:
    """A pool that holds two prompts of six: the others are in the host tier when they come again."""
    small = {"num_blocks": 16, "max_num_seqs": 1, "max_model_len": 120}
    found = []
    for num_ranks, host_kv_bytes in ((1, 0), (2, 1 << 20)):
        with engine_of(folder, num_ranks, host_kv_bytes=host_kv_bytes, **small) as engine:
            answers = []
            for turn in range(2):
                for index in range(6):
                    prompt = tuple((11 * index + 5 * position) % 250 for position in range(90))
                    request = TokenRequest(prompt, 90, SamplingParams(max_tokens=6, ignore_eos=True))
                    engine.submit(request, SequenceKey(f"{turn} {index}"))
                    answers.append(tokens(engine)[f"{turn} {index}"])
            found.append(answers)
            assert (engine.load().host_hit_tokens > 0) == (num_ranks == 2)
    assert found[1] == found[0]


def move_prefix(source: TorchEngine, target: TorchEngine, request: TokenRequest) -> int:
    """Through host memory, as a transfer would; returns how many tokens `target` has then."""
    key, layers = SequenceKey("prefix"), range(source.kv.layout.num_layers)
    pinned = source.pin_prefix(Prefix(request.token_ids), key)
    reserved = target.reserve_prefix(Prefix(request.token_ids), key)
    moved, num_bytes = (
        range(pinned.num_cached_tokens),
        pinned.num_cached_tokens * source.kv.layout.token_bytes,
    )
    sent, received = (engine.kv.allocate_staging(num_bytes) for engine in (source, target))
    source.kv.gather(pinned.block_table, layers, moved, sent, 0).wait()
    received.host_view()[:num_bytes] = sent.host_view()[:num_bytes]
    target.kv.scatter(reserved.block_table, layers, moved, received, 0).wait()
    source.release(key)
    return target.keep_prefix(key, len(moved))


def test_a_prefix_goes_from_one_rank_to_two_and_back(folder: Path, num_threads: None) -> None:
    """Back it goes from the host tier: the pool of the two holds two prompts."""
    small = {"num_blocks": 16, "max_num_seqs": 1, "max_model_len": 120}
    first, *others = (
        TokenRequest(
            tuple((11 * index + 5 * position) % 250 for position in range(90)),
            90,
            SamplingParams(max_tokens=6, ignore_eos=True),
        )
        for index in range(4)
    )
    key = SequenceKey("it")
    with engine_of(folder, 1) as one, engine_of(folder, 2, host_kv_bytes=1 << 20, **small) as two:
        one.submit(first, key)
        computed = tokens(one)
        assert move_prefix(one, two, first) == 80
        two.submit(first, key)
        assert tokens(two) == computed
        assert two.load().prefix_hit_tokens == 80
        for index, request in enumerate(others):
            two.submit(request, SequenceKey(str(index)))
            tokens(two)
        with engine_of(folder, 1) as another:
            assert move_prefix(two, another, first) == 80
            another.submit(first, key)
            assert tokens(another) == computed
            assert another.load().prefix_hit_tokens == 80
        assert one.load().num_held_blocks == two.load().num_held_blocks == 0


def test_a_lost_rank_fails_the_engine(folder: Path, num_threads: None) -> None:
    with engine_of(folder, 2) as engine:
        assert engine._ranks is not None
        ask(engine, 1, num_tokens=100)
        engine.step()
        os.kill(engine._ranks.followers.pids[0], signal.SIGKILL)
        with pytest.raises((EngineFailed, RuntimeError)):
            tokens(engine)


def test_close_ends_the_other_ranks(folder: Path, num_threads: None) -> None:
    with engine_of(folder, 2) as engine:
        assert engine._ranks is not None
        pids = engine._ranks.followers.pids
        engine.close()
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_weights_that_cannot_be_read_leave_no_rank_behind(folder: Path, num_threads: None) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(ConfigError, match=r"model\.safetensors"), engine_of(folder, 2, random_weights=False):
        pass
    assert not [child.name for child in multiprocessing.active_children() if "rank" in child.name]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"intermediate_size": 129}, "intermediate_size 129"),
    ],
)
def test_what_does_not_divide_is_named(folder: Path, change: dict[str, int], named: str) -> None:
    (folder / "config.json").write_text(json.dumps({**SHAPE, **change}))
    with pytest.raises(ConfigError, match=f"tensor_parallel_size 2 .*{named}"), engine_of(folder, 2):
        pass


def test_parts_of_stacked_matrices_lie_one_below_the_other() -> None:
    stacked = torch.arange(12).view(6, 2)
    parts = [Shard(rank, 2).parts(stacked, [4, 2]).tolist() for rank in range(2)]
    assert parts == [[[0, 1], [2, 3], [8, 9]], [[4, 5], [6, 7], [10, 11]]]


def test_a_vocabulary_that_does_not_divide_is_padded() -> None:
    matrix = torch.arange(10).view(5, 2)
    parts = torch.cat([vocabulary_part(matrix, Shard(rank, 2)) for rank in range(2)])
    assert torch.equal(parts[:5], matrix)
    assert parts[5:].tolist() == [[0, 0]]


def test_a_process_that_forgets_to_close_ends_all_the_same(folder: Path) -> None:
    code = (
        "import sys; from kvrelay.engine.config import EngineConfig\n"
        "from kvrelay.engine.torch_engine import TorchEngine\n"
        "if __name__ == '__main__':\n"
        "    engine = TorchEngine(EngineConfig(sys.argv[1], random_weights=True, num_blocks=20,\n"
        "        num_threads=1, tensor_parallel_size=2))\n"
        "    print(*engine._ranks.followers.pids)\n"
    )
    script = folder / "forgetful.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=120, check=True
    )
    for pid in map(int, done.stdout.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
