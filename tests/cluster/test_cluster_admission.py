"""Overload on real processes: who is refused learns why and when to come back, and nothing is left behind."""

from __future__ import annotations

import asyncio

import pytest

from kvrelay.client import AsyncClient, ClientConfig
from kvrelay.core.errors import DeadlineExceeded, Overloaded
from kvrelay.core.sampling import SamplingParams

pytestmark = pytest.mark.cluster

SLOW_SIM = [
    "--model=sim",
    "--max-num-seqs=16",
    "--max-num-batched-tokens=64",
    "--sim-prefill-base-s=0.03",
    "--sim-decode-base-s=0",
]
ROUTER_CONFIG = """
[router.core]
max_queued_requests = 100
max_prefill_requests_per_node = 2
trial_share = 0.0

[router.core.priorities.low]
max_queued = 2
"""


async def outcomes(cluster, number: int, **options) -> list[str | Overloaded | DeadlineExceeded]:
    """Of so many requests at once: the finish reason, or the error."""
    async with AsyncClient([cluster.address], config=ClientConfig(max_retries=0)) as client:

        async def one(index: int):
            sampling = SamplingParams(max_tokens=3, ignore_eos=True)
            prompt = [100 + index] * 60
            try:
                return (
                    await client.complete(prompt, sampling=sampling, decode_text=False, **options)
                ).finish_reason
            except (Overloaded, DeadlineExceeded) as error:
                return error

        return await asyncio.gather(*[one(index) for index in range(number)])


@pytest.fixture
def slow_cluster(starter, tmp_path):
    config = tmp_path / "router.toml"
    config.write_text(ROUTER_CONFIG)
    return starter.start(1, 1, SLOW_SIM, router_args=["--config", str(config)])


async def test_what_can_not_be_in_time_is_refused_and_the_rest_is_served(slow_cluster) -> None:
    await outcomes(slow_cluster, 20)
    told = await outcomes(slow_cluster, 60, ttft_timeout_s=0.3)
    errors = [outcome for outcome in told if not isinstance(outcome, str)]
    assert 0 < len(errors) < 60
    assert all(error.retry_after_s for error in errors if isinstance(error, Overloaded))
    state = await slow_cluster.wait_idle()
    by_reason = {queue.priority.value: queue.refused for queue in state.queues}["normal"]
    assert by_reason["deadline"] + by_reason["dropped"] == len(errors)
    assert all(outcome == "length" for outcome in await outcomes(slow_cluster, 10)), "nothing is left behind"


async def test_a_full_class_refuses_by_name_and_others_still_wait(slow_cluster) -> None:
    low, high = await asyncio.gather(
        outcomes(slow_cluster, 30, priority="low", tenant="night"),
        outcomes(slow_cluster, 30, priority="high", tenant="day"),
    )
    assert all(outcome == "length" for outcome in high)
    errors = [outcome for outcome in low if not isinstance(outcome, str)]
    assert errors
    assert all("priority low" in error.message for error in errors)
    state = await slow_cluster.wait_idle()
    refused = {queue.priority.value: sum(queue.refused.values()) for queue in state.queues}
    assert refused == {"high": 0, "normal": 0, "low": len(errors)}
