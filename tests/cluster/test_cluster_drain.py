"""`kvrelay drain` on real processes: the node leaves, what it had is answered, the others go on."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from kvrelay.core.sampling import SamplingParams

pytestmark = pytest.mark.cluster

PROMPT = tuple(range(3, 60))


async def run_drain(cluster: Any, *arguments: str) -> tuple[int | None, str, str]:
    """Exit status, stdout and stderr of the command."""
    command = ["-m", "kvrelay.cli", "drain", *arguments, "--router", cluster.address]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize("node", ["p0", "d0"])
async def test_a_node_that_is_drained_leaves_and_no_request_is_lost(starter: Any, node: str) -> None:
    cluster = starter.start(2, 2, ["--model=sim", "--num-blocks=256"])
    sampling = SamplingParams(max_tokens=120, ignore_eos=True)
    async with cluster.client() as client:
        [expected] = {(await client.complete(PROMPT, sampling=sampling)).token_ids}
        asked = [asyncio.create_task(client.complete(PROMPT, sampling=sampling)) for _ in range(8)]
        code, out, _ = await run_drain(cluster, node)
        assert {result.token_ids for result in await asyncio.gather(*asked)} == {expected}
        assert (code, out) == (0, f"{node} drains\n{node} has left\n")
        state = await client.cluster_state()
        assert {one.node_id for one in state.nodes} == {"p0", "p1", "d0", "d1"} - {node}
        assert await asyncio.to_thread(cluster.nodes[node].popen.wait) == 0
        assert (await client.complete(PROMPT, sampling=sampling)).token_ids == expected


async def test_an_unknown_node_is_an_error_that_names_it(starter: Any) -> None:
    cluster = starter.start(1, 1, ["--model=sim"])
    code, out, err = await run_drain(cluster, "p9")
    assert code == 2
    assert not out
    assert "p9" in err
    assert len((await cluster.wait_idle()).nodes) == 2
