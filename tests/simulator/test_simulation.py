"""What runs of the simulator show: conservation, repeatability, and what each policy is for."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvrelay.core.errors import ConfigError
from kvrelay.simulator.policies import POLICIES
from kvrelay.simulator.scenario import Scenario
from kvrelay.simulator.summary import Summary

RunPolicy = Callable[..., Summary]


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("num_decode_nodes", [0, 3])
def test_every_request_is_served_once_under_every_policy(
    run_policy: RunPolicy, policy: str, num_decode_nodes: int
) -> None:
    summary = run_policy(policy, num_decode_nodes=num_decode_nodes, load=1.2)
    assert (summary.refused, summary.unfinished) == (0, 0)
    assert 0.0 <= summary.pulled_rate <= summary.hit_rate < 1.0
    assert summary.ttft_s.p50 is not None
    assert (summary.itl_s.p50 is None) == (num_decode_nodes == 0)


@pytest.mark.parametrize("policy", ["kvrelay", "mooncake-pull", "random"])
def test_the_same_seed_gives_the_same_figures(run_policy: RunPolicy, policy: str) -> None:
    first, again, other = (run_policy(policy, num_decode_nodes=2, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert replace(other, seed=5) != first, "the seed plays a part"


def test_one_node_hits_what_the_pooled_cache_hits(run_policy: RunPolicy) -> None:
    summary = run_policy("round-robin", num_prefill_nodes=1, cache_blocks=100_000)
    assert summary.hit_rate == pytest.approx(summary.pooled_hit_rate)
    assert summary.balance_max_over_mean == 1.0


def test_caches_large_enough_are_used_as_one(run_policy: RunPolicy) -> None:
    summary = run_policy("kvrelay", cache_blocks=100_000)
    assert summary.hit_rate > summary.pooled_hit_rate - 0.03
    assert summary.hit_rate > run_policy("round-robin", cache_blocks=100_000).hit_rate + 0.1


def test_saturated_nodes_do_not_collapse(run_policy: RunPolicy) -> None:
    kvrelay, greedy = (run_policy(policy, load=1.6, cache_blocks=60) for policy in ("kvrelay", "mooncake"))
    assert kvrelay.ttft_s.p90 is not None
    assert greedy.ttft_s.p90 is not None
    assert kvrelay.ttft_s.p90 < greedy.ttft_s.p90


def test_what_waits_too_long_is_refused(run_policy: RunPolicy) -> None:
    summary = run_policy("kvrelay", load=20.0, queue_timeout_s=0.5)
    assert summary.refused > 0
    assert summary.unfinished == 0
    assert summary.goodput < 1.0


def test_what_finds_a_full_queue_is_refused(run_policy: RunPolicy) -> None:
    summary = run_policy("kvrelay", load=20.0, max_queued=4)
    assert summary.refused > 0
    assert summary.unfinished == 0


def test_all_faults_of_a_scenario_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Scenario(num_prefill_nodes=0, num_decode_nodes=1, cache_blocks=0, policy="kvrelay", load=-1.0)
    for name in ("num_prefill_nodes", "cache_blocks", "load"):
        assert name in caught.value.message


def test_goodput_counts_what_met_both_limits(run_policy: RunPolicy) -> None:
    limits: dict[str, Any] = {"num_decode_nodes": 3, "ttft_limit_s": 1e6}
    assert run_policy("kvrelay", itl_limit_s=1e6, **limits).goodput == 1.0
    assert run_policy("kvrelay", itl_limit_s=1e-5, **limits).goodput < 0.2, "only single-token answers"
