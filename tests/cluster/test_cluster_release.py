"""Whoever gives up a request, in whatever state, both nodes' KV comes back at once."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator

import pytest

from kvrelay.client import AsyncClient
from kvrelay.core.errors import DeadlineExceeded, RequestCancelled
from kvrelay.core.sampling import SamplingParams

pytestmark = pytest.mark.cluster

LONG_PROMPT = [7] * 3000
SHORT_PROMPT = [7, 8, 9]
MANY_TOKENS = SamplingParams(max_tokens=2000, ignore_eos=True)
# Slow enough that each state lasts until the test has seen it; a step still ends soon after a cancellation.
SLOW_SIM = [
    "--model=sim",
    "--progress-timeout-s=600",
    "--num-blocks=1024",
    "--max-num-batched-tokens=16",
    "--max-num-seqs=8",
    "--sim-prefill-base-s=0.05",
    "--sim-decode-base-s=0.05",
]


@contextlib.asynccontextmanager
async def _in_state(
    cluster, client: AsyncClient, state: str, timeout_s: float | None = None
) -> AsyncIterator[asyncio.Task]:
    """A request that is in `state`, as the router sees it; `task.result()` is what the client got."""
    tasks: list[asyncio.Task] = []
    try:
        if state == "queued":
            tasks += [asyncio.create_task(_run(client, LONG_PROMPT, f"blocker-{i}")) for i in range(2)]
            await _wait_for_count(cluster, "prefilling", 2)
        if state == "handing_off":
            cluster.nodes["d0"].popen.send_signal(signal.SIGSTOP)
        prompt = LONG_PROMPT if state == "prefilling" else SHORT_PROMPT
        tasks.append(asyncio.create_task(_run(client, prompt, "under-test", timeout_s)))
        await _wait_for_count(cluster, state, 1)
        yield tasks[-1]
    finally:
        if state == "handing_off":
            cluster.nodes["d0"].popen.send_signal(signal.SIGCONT)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _wait_for_count(cluster, state: str, count: int) -> None:
    await cluster.wait_for_state(f"{count} requests {state}", lambda s: s.num_requests.get(state, 0) == count)


async def _run(
    client: AsyncClient, prompt: list[int], request_id: str, timeout_s: float | None = None
) -> object:
    return await client.complete(prompt, sampling=MANY_TOKENS, request_id=request_id, timeout_s=timeout_s)


STATES = ["queued", "prefilling", "handing_off", "decoding"]


@pytest.fixture
def cluster(starter):
    """Leases and transfer time-outs outlast every wait below: what comes back was released, not expired."""
    return starter.start(1, 1, SLOW_SIM, router_args=["--max-prefill-requests-per-node=2", "--lease-s=600"])


@pytest.mark.parametrize("state", STATES)
async def test_cancel_by_id_releases_both_nodes(cluster, state: str) -> None:
    async with cluster.client() as client, _in_state(cluster, client, state) as task:
        await client.cancel("under-test")
        with pytest.raises(RequestCancelled):
            await task
    await cluster.wait_idle()


@pytest.mark.parametrize("state", STATES)
async def test_a_client_that_goes_away_releases_both_nodes(cluster, state: str) -> None:
    async with cluster.client() as bystander:
        async with AsyncClient([cluster.address]) as leaver, _in_state(cluster, leaver, state) as task:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (await bystander.complete(SHORT_PROMPT, sampling=SamplingParams(max_tokens=2))).token_ids
    await cluster.wait_idle()


@pytest.mark.parametrize("state", STATES)
async def test_a_request_past_its_deadline_fails_as_such_and_releases_both_nodes(cluster, state: str) -> None:
    async with cluster.client() as client, _in_state(cluster, client, state, timeout_s=4.0) as task:
        with pytest.raises(DeadlineExceeded):
            await task
    await cluster.wait_idle()
