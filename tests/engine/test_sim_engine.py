"""What is particular to the simulated engine: time, and stamps that show wrong KV."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvrelay.core.errors import ConfigError, InvalidRequest
from kvrelay.core.sampling import Grammar, GrammarKind
from kvrelay.engine.config import EngineConfig, EngineKind
from kvrelay.engine.factory import load_engine
from kvrelay.engine.sim.engine import SimEngine
from kvrelay.engine.sim.timing import SimTiming


def prefilled(build_sim, drive, request_of, prompt_of):
    source, target = drive(build_sim()), drive(build_sim())
    request = request_of(prompt_of(30), max_tokens=5)
    source.engine.submit_prefill(request, "s")
    source.run()
    return source, target, request


def test_kv_that_never_arrived_fails_the_sequence(build_sim, drive, request_of, prompt_of):
    source, target, request = prefilled(build_sim, drive, request_of, prompt_of)
    target.engine.reserve(request, "s")
    target.engine.start_decode("s", source.tokens("s")[0])
    assert target.engine.has_work(), "the failure waits to be told"
    target.step()
    assert [failure.key for failure in target.failures] == ["s"]
    assert "wrong KV" in target.failures[0].message
    assert target.engine.load().num_held_blocks == 0
    assert not target.engine.has_work()


@pytest.mark.parametrize("fault", ["one layer missing", "shifted by one", "swapped ranges"])
def test_misplaced_kv_fails_the_sequence(build_sim, drive, request_of, prompt_of, move_kv, fault):
    source, target, request = prefilled(build_sim, drive, request_of, prompt_of)
    ready = source.ready
    if fault == "one layer missing":
        move_kv(source.engine, target.engine, "s", request, ready[:-1])
    else:
        reservation = target.engine.reserve(request, "s")
        staging = source.engine.kv.allocate_staging(4096)
        table, layers = ready[0].block_table, range(4)
        tokens = range(30)
        if fault == "shifted by one":
            source.engine.kv.gather(table, layers, range(1, 30), staging, 0).wait()
            target.engine.kv.scatter(reservation.block_table, layers, range(29), staging, 0).wait()
        else:
            source.engine.kv.gather(table, layers, tokens, staging, 0).wait()
            swapped = (
                *reservation.block_table[1:2],
                *reservation.block_table[:1],
                *reservation.block_table[2:],
            )
            target.engine.kv.scatter(swapped, layers, tokens, staging, 0).wait()
    target.engine.start_decode("s", source.tokens("s")[0])
    target.step()
    assert [failure.key for failure in target.failures] == ["s"]


def test_kv_of_another_prompt_fails_the_sequence(build_sim, drive, request_of, prompt_of, move_kv):
    source, target, _ = prefilled(build_sim, drive, request_of, prompt_of)
    move_kv(source.engine, target.engine, "s", request_of(prompt_of(30, 1)), source.ready)
    target.engine.start_decode("s", 5)
    target.step()
    assert len(target.failures) == 1


def test_what_needs_logits_is_refused_by_name(build_sim, request_of, prompt_of):
    engine = build_sim()
    for enter in (engine.submit, engine.submit_prefill, engine.reserve):
        for name, value in (("grammar", Grammar(GrammarKind.JSON_OBJECT)), ("logit_bias", ((5, 1.0),))):
            with pytest.raises(InvalidRequest) as refusal:
                enter(request_of(prompt_of(9), **{name: value}), "a")
            assert refusal.value.field == f"sampling.{name}"
    assert engine.load().num_held_blocks == 0
    assert not engine.has_work()


def test_steps_take_the_modelled_time(request_of, prompt_of):
    slept = []
    timing = SimTiming(0.01, 0.001, 1e-6, 0.005, 0.0001, 1e-7)
    config = EngineConfig(model="m", engine=EngineKind.SIM, num_blocks=64, sim_timing=timing)
    engine = SimEngine(config, sleep=slept.append)
    engine.submit(request_of(prompt_of(100), max_tokens=2), "a")
    engine.step()
    engine.step()
    assert slept == pytest.approx([0.01 + 100 * (0.001 + 1e-6 * 50), 0.005 + 0.0001 + 1e-7 * 100])


def test_layers_of_a_prefill_become_ready_while_time_passes(request_of, prompt_of):
    events = []
    config = EngineConfig(model="m", engine=EngineKind.SIM, num_blocks=64, layers_per_group=1)
    engine = SimEngine(config, sleep=lambda step_s: events.append("sleep"))
    engine.set_kv_ready_listener(lambda ready: events.append(ready.layers.start))
    engine.submit_prefill(request_of(prompt_of(100)), "a")
    engine.step()
    assert events == ["sleep", 0, "sleep", 1, "sleep", 2, "sleep", 3]


def test_timing_out_of_range_is_refused_by_name():
    with pytest.raises(ConfigError, match="decode_seq_s"):
        SimTiming(decode_seq_s=-1.0)
    with pytest.raises(ConfigError, match="prefill_base_s"):
        SimTiming(prefill_base_s=float("nan"))


def test_engines_of_one_model_match_and_of_two_do_not(build_sim):
    assert build_sim(num_blocks=9).info.fingerprint == build_sim(block_size=7).info.fingerprint
    assert build_sim().info.fingerprint != build_sim(model="other").info.fingerprint


def test_importing_and_running_the_simulated_engine_needs_no_torch():
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import kvrelay.engine\n"
        "from kvrelay.engine.config import EngineConfig, EngineKind\n"
        "from kvrelay.engine.factory import load_engine\n"
        "config = EngineConfig(model='m', engine=EngineKind.SIM, num_blocks=8)\n"
        "assert load_engine(config).info.engine == 'sim'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_all_faults_of_a_config_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="", dtype="int4", device="tpu", num_blocks=0, max_num_seqs=0, block_size=True)
    for name in ("model", "dtype", "device", "num_blocks", "max_num_seqs", "block_size"):
        assert name in caught.value.message


def test_batch_budget_below_the_sequence_limit_is_refused():
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        EngineConfig(model="m", max_num_seqs=64, max_num_batched_tokens=32)


def test_factory_builds_the_torch_engine(tiny_llama):
    engine = load_engine(EngineConfig(model=str(tiny_llama), num_blocks=8, num_threads=1, served_name="tiny"))
    assert (engine.info.engine, engine.info.model) == ("torch", "tiny")
