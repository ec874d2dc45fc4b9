"""A router knows which blocks its nodes hold, as many as they say themselves, after evictions and restarts
too."""

from __future__ import annotations

import asyncio

import pytest

from kvrelay.core.cluster_view import ClusterState
from kvrelay.core.sampling import SamplingParams

pytestmark = pytest.mark.cluster

SMALL_SIM = [
    "--model=sim",
    "--num-blocks=40",
    "--host-kv-bytes=20480",
    "--max-num-seqs=8",
    "--sim-decode-base-s=0",
]
"""Of 40 blocks, with room for 20 in host memory."""


def num_held(state: ClusterState) -> int:
    """Blocks that the nodes hold when idle, each tier for itself, by their own account."""
    loads = [node.load for node in state.nodes]
    return sum(load.num_cached_blocks + load.num_used_host_blocks for load in loads if load is not None)


def is_in_step(state: ClusterState) -> bool:
    return not any(node.index_stale for node in state.nodes) and state.index.num_entries == num_held(state)


async def _ask(cluster, prompts: list[list[int]]) -> None:
    async with cluster.client() as client:
        sampling = SamplingParams(max_tokens=40, ignore_eos=True)
        streams = [client.generate(prompt, sampling=sampling) for prompt in prompts]
        await asyncio.gather(*[stream.each(lambda chunk: None) for stream in streams])


async def test_the_index_is_what_the_nodes_hold(starter) -> None:
    cluster = starter.start(2, 2, SMALL_SIM)
    prompts = [[1 + number % 3] * 100 + [10 + number] * 100 for number in range(24)]
    await _ask(cluster, prompts)
    await cluster.wait_idle()
    state = await cluster.wait_for_state("the index holds what the nodes do", is_in_step)
    assert all(node.load is not None and node.load.num_used_host_blocks for node in state.nodes), (
        "nothing was evicted"
    )
    assert state.index.num_entries > 100
    assert state.counters["kv_gaps"] == 0


async def test_a_router_that_starts_again_knows_the_whole_index(starter) -> None:
    cluster = starter.start(1, 1, SMALL_SIM)
    await _ask(cluster, [[number + 1] * 150 for number in range(6)])
    await cluster.wait_idle()
    before = await cluster.wait_for_state("the index holds what the nodes do", is_in_step)
    port = cluster.address.rpartition(":")[2]
    cluster.router.kill()
    cluster.router = starter.spawn_router(cluster.folder, ["--port", port])
    after = await cluster.wait_for_state(
        "both nodes are back and in step", lambda state: len(state.nodes) == 2 and is_in_step(state)
    )
    assert after.index.num_entries == before.index.num_entries > 0


async def test_a_node_that_is_killed_leaves_nothing_in_the_index(starter) -> None:
    cluster = starter.start(2, 1, SMALL_SIM)
    await _ask(cluster, [[number + 1] * 150 for number in range(6)])
    await cluster.wait_idle()
    cluster.nodes["p0"].kill()
    state = await cluster.wait_for_state(
        "the index holds what the others do", lambda state: len(state.nodes) == 2 and is_in_step(state)
    )
    assert state.index.num_entries > 0
