"""Overload and greed in simulated clusters, and the traces that are made for them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from kvrelay.core.service_terms import Priority, ServiceTerms
from kvrelay.simulator.cost_model import load_cost_model
from kvrelay.simulator.made_trace import Crowd, make_trace
from kvrelay.simulator.run import simulate
from kvrelay.simulator.scenario import Scenario
from kvrelay.simulator.summary import Summary
from kvrelay.simulator.trace import Trace

TTFT_LIMIT_S = 0.5


def run(trace: Trace, load: float, **settings: object) -> tuple[Summary, np.ndarray]:
    """Two prefill nodes, one decode node; also whether each request's first token was in time."""
    scenario = Scenario(
        num_prefill_nodes=2,
        num_decode_nodes=1,
        cache_blocks=100,
        policy="kvrelay",
        load=load,
        ttft_limit_s=TTFT_LIMIT_S,
        itl_limit_s=1.0,
        **settings,  # type: ignore[arg-type]
    )
    summary, done = simulate(trace, scenario, load_cost_model("h100"), pooled_rate=0.0)
    ttft_s = np.array(done.seen.ttft_s)
    return summary, (ttft_s >= 0) & (ttft_s <= TTFT_LIMIT_S)


def test_a_made_trace_has_the_lengths_and_the_crowds_that_were_asked_for() -> None:
    crowds = [Crowd(ServiceTerms(tenant="a"), 3.0), Crowd(ServiceTerms(Priority.LOW, "b"))]
    trace = make_trace(4000, mean_prompt_tokens=1000, mean_output_tokens=50, crowds=crowds)
    assert trace.num_prompt_tokens.mean() == pytest.approx(1000, rel=0.1)
    assert trace.num_output_tokens.mean() == pytest.approx(50, rel=0.1)
    assert trace.arrivals_s[-1] == pytest.approx(4000, rel=0.1)
    assert Counter(terms.tenant for terms in trace.terms)["a"] == pytest.approx(3000, rel=0.1)
    assert len({block for index in range(10) for block in trace.blocks_of(index)}) == sum(
        len(trace.blocks_of(index)) for index in range(10)
    )
    assert trace.first(5).terms == trace.terms[:5]


def test_under_overload_as_much_is_served_in_time_as_at_any_load_if_requests_tell_their_limits() -> None:
    told, untold = (
        [run(make_trace(int(500 * load)), load, has_deadlines=tells)[0] for load in (0.8, 1.0, 3.0)]
        for tells in (True, False)
    )
    goodput = [summary.goodput_per_s for summary in told]
    assert goodput[2] >= 0.9 * max(goodput)
    assert untold[2].goodput_per_s < 0.5 * goodput[2]
    assert sum(told[2].refused_by_reason.values()) == told[2].refused


def test_requests_that_can_not_end_in_time_are_refused_and_those_that_are_served_do() -> None:
    trace = make_trace(600, mean_output_tokens=400)
    summary, _ = run(trace, 0.7, has_deadlines=True, total_limit_s=6.0, trial_share=0.0)
    assert summary.refused_by_reason["deadline"] > 50
    num_served = summary.requests - summary.refused
    assert summary.goodput * summary.requests > 0.97 * num_served


def test_a_greedy_tenant_takes_from_the_others_only_if_they_are_not_told_apart() -> None:
    modest = [Crowd(ServiceTerms(tenant=f"t{number}")) for number in range(10)]
    crowds = [*modest, Crowd(ServiceTerms(tenant="greedy"), 10.0)]
    trace = make_trace(1500, crowds=crowds, mean_output_tokens=40)
    is_modest = np.array([terms.tenant != "greedy" for terms in trace.terms])
    _, in_time = run(trace, 1.5, has_deadlines=True)
    _, in_time_unnamed = run(make_trace(1500, mean_output_tokens=40), 1.5, has_deadlines=True)
    assert in_time[is_modest].mean() > 0.95
    assert in_time[is_modest].mean() > in_time_unnamed[is_modest].mean() + 0.05
    assert in_time[~is_modest].mean() < 0.7


def test_a_higher_class_is_served_first_and_a_lower_one_gets_its_share() -> None:
    crowds = [Crowd(ServiceTerms(priority)) for priority in Priority]
    trace = make_trace(1500, crowds=crowds, mean_output_tokens=40)
    _, in_time = run(trace, 2.0, has_deadlines=True)
    served = {
        priority: in_time[[terms.priority is priority for terms in trace.terms]].mean()
        for priority in Priority
    }
    assert served[Priority.HIGH] > 0.9
    assert served[Priority.HIGH] > served[Priority.NORMAL] > served[Priority.LOW] > 0.02
