"""One simulated run from its parts to its summary."""

from __future__ import annotations

import math

from kvrelay.core.errors import ConfigError
from kvrelay.simulator.cost_model import CostModel
from kvrelay.simulator.pooled_cache import pooled_hit_rate
from kvrelay.simulator.scenario import Scenario
from kvrelay.simulator.simulation import Simulation
from kvrelay.simulator.summary import Summary, summarise
from kvrelay.simulator.trace import Trace, compress_arrivals


def simulate(
    trace: Trace, scenario: Scenario, costs: CostModel, *, pooled_rate: float | None = None
) -> tuple[Summary, Simulation]:
    """Compress the trace's arrivals to the scenario's load and serve it. `pooled_rate`: the pooled cache's
    hit rate, where it is known already.

    Raises:
        ConfigError: the policy is unknown, or the trace can't be compressed.
    """
    compressed = compress_arrivals(trace, scenario.load, scenario.num_prefill_nodes, costs.prefill)
    simulation = Simulation(compressed, scenario, costs)
    simulation.run()
    if pooled_rate is None:
        pooled_rate = pooled_hit_rate(trace, scenario.num_prefill_nodes * scenario.cache_blocks)
    return summarise(compressed, scenario, costs, simulation, pooled_rate), simulation


def check_fits_decode(trace: Trace, costs: CostModel) -> None:
    """Every request must fit into a decode node alone.

    Raises:
        ConfigError: one does not.
    """
    room = costs.decode.kv_tokens // trace.block_tokens * trace.block_tokens
    most = int((trace.num_prompt_tokens + trace.num_output_tokens).max())
    if most >= room:
        raise ConfigError(
            f"trace {trace.name} has a request of {most} tokens; a decode node of cost model {costs.name}"
            f" has room for {math.floor(room)} (decode.kv_tokens); --no-decode leaves decode out",
            field="TRACE",
        )
