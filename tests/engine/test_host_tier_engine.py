"""The torch engine with a pool that is too small and a host tier: the tokens of one with room for all."""

from __future__ import annotations

import pytest

from kvrelay.core.errors import ConfigError
from kvrelay.engine.config import EngineConfig

BLOCK_BYTES = 3 * 2 * 4 * 2 * 16 * 4
SMALL = {
    "num_blocks": 24,
    "block_size": 4,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "max_waiting": 64,
}
TIERED = {**SMALL, "host_kv_bytes": 60 * BLOCK_BYTES}


@pytest.fixture(params=["plain", "staged"])
def build(request, monkeypatch, tiny_llama):
    """The CPU's own copies, and those of CUDA's module, a few blocks a load."""
    from kvrelay.engine.cuda.block_mover import CudaBlockMover
    from kvrelay.engine.device import CpuDevice
    from kvrelay.engine.torch_engine import TorchEngine

    if request.param == "staged":
        monkeypatch.setattr(
            CpuDevice,
            "block_mover",
            lambda self, cache, num_slots: CudaBlockMover(cache, num_slots, load_bytes=3 * BLOCK_BYTES),
        )
    return lambda **settings: TorchEngine(EngineConfig(model=str(tiny_llama), **settings))


def test_prompts_that_come_again_get_the_same_tokens_from_the_host(build, drive, request_of, prompt_of):
    requests = [request_of(prompt_of(50, variant), max_tokens=12) for variant in range(4)]
    expected = [drive(build(**SMALL)).generate(request)[0] for request in requests]
    driver = drive(build(**TIERED))
    for _ in range(3):
        assert [driver.generate(request)[0] for request in requests] == expected
    load = driver.engine.load()
    assert load.host_hit_tokens > 200
    assert load.host_hit_tokens <= load.prefix_hit_tokens
    assert 0 < load.num_used_host_blocks <= load.num_host_blocks == 60
    roomy = drive(build(**{**SMALL, "num_blocks": 200}))
    assert [roomy.generate(request)[0] for request in requests * 2] == expected * 2
    assert roomy.engine.load().host_hit_tokens == 0


def test_a_host_hit_counts_as_cached_and_is_not_computed(build, request_of, prompt_of):
    engine = build(**TIERED)
    counts = []
    for variant in (0, 1, 2, 0):
        engine.submit(request_of(prompt_of(50, variant), max_tokens=1), f"k{len(counts)}")
        counts.append(0)
        while engine.has_work():
            counts[-1] += engine.step().num_prefill_tokens
    assert counts == [50, 50, 50, 2]
    assert engine.load().host_hit_tokens > 0


def test_interrupted_sequences_come_back_from_the_host(build, drive, request_of, prompt_of):
    requests = [
        request_of(prompt_of(10, variant), max_tokens=50, temperature=0.8, seed=variant)
        for variant in range(6)
    ]
    roomy = {**SMALL, "num_blocks": 200}
    expected = [drive(build(**roomy)).generate(request)[0] for request in requests]
    driver = drive(build(**TIERED))
    assert driver.generate(*requests) == expected
    assert driver.engine.load().num_preemptions > 0
    assert driver.engine.load().host_hit_tokens > 0
    assert driver.engine.load().num_held_blocks == 0


def test_a_handoff_announces_and_sends_what_came_from_the_host(build, drive, request_of, prompt_of, move_kv):
    source, target = drive(build(**TIERED)), drive(build(**TIERED))
    requests = [request_of(prompt_of(50, variant), max_tokens=10) for variant in range(4)]
    expected = [drive(build(**SMALL)).generate(request)[0] for request in requests]
    for turn in range(3):
        for index, request in enumerate(requests):
            key = f"k{turn}-{index}"
            source.ready.clear()
            source.engine.submit_prefill(request, key)
            source.run()
            if turn:
                num_layers = source.engine.kv.layout.num_layers
                assert (source.ready[0].layers, source.ready[0].tokens) == (range(num_layers), range(48))
            move_kv(source.engine, target.engine, key, request, source.ready)
            target.engine.start_decode(key, source.tokens(key)[0])
            source.engine.release(key)
            target.run()
            assert source.tokens(key) + target.tokens(key) == expected[index]
    assert source.engine.load().host_hit_tokens > 100
    assert target.engine.load().host_hit_tokens > 100, "the receiver had a part itself"


def test_a_tier_smaller_than_a_block_is_refused(build):
    with pytest.raises(ConfigError, match="host_kv_bytes"):
        build(**{**SMALL, "host_kv_bytes": BLOCK_BYTES - 1})
    with pytest.raises(ConfigError, match="host_kv_bytes"):
        build(**{**SMALL, "host_kv_bytes": -1})
