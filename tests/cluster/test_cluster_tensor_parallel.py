"""Nodes of several ranks: KV moves between any two degrees, and no rank outlives its node."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams

pytestmark = pytest.mark.cluster
NODE = ("--dtype", "float32", "--num-blocks", "400", "--num-threads", "1")


def _requests() -> list[TokenRequest]:
    shared = tuple(index * 5 % 250 for index in range(90))
    prompts = [
        shared + tuple((index + 3 * position) % 250 for position in range(index)) for index in range(1, 60, 7)
    ]
    prompts += [(9,), tuple(index * 7 % 251 for index in range(1200))]
    return [
        TokenRequest(
            prompt,
            len(prompt),
            SamplingParams(max_tokens=10, temperature=0.7 * (index % 2), seed=index, ignore_eos=True),
        )
        for index, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize(("prefill_ranks", "decode_ranks"), [(2, 1), (1, 2), (2, 2)])
async def test_kv_moves_between_degrees(
    starter, run_alone, tiny_llama: Path, prefill_ranks: int, decode_ranks: int
) -> None:
    cluster = starter.start(
        1,
        1,
        ["--model", str(tiny_llama), *NODE],
        prefill_args=[f"--tensor-parallel-size={prefill_ranks}", "--block-size=16"],
        decode_args=[f"--tensor-parallel-size={decode_ranks}", "--block-size=8"],
    )
    requests = _requests()
    async with cluster.client() as client:
        answers = await asyncio.gather(
            *(client.complete(request.token_ids, sampling=request.sampling) for request in requests)
        )
    assert [answer.token_ids for answer in answers] == run_alone(tiny_llama, requests)
    await cluster.wait_idle()
    ranks = [pid for node in cluster.nodes.values() for pid in _ranks_of(node.popen.pid)]
    assert len(ranks) == prefill_ranks + decode_ranks - 2
    for rank in ranks:  # as a terminal and systemd do, which signal all of a service's processes
        os.kill(rank, signal.SIGINT)
        os.kill(rank, signal.SIGTERM)
    async with cluster.client() as client:
        again = await client.complete(requests[0].token_ids, sampling=requests[0].sampling)
    assert again.token_ids == answers[0].token_ids
    for node in cluster.nodes.values():
        node.stop()
        assert node.popen.returncode == 0
    assert not [pid for pid in ranks if _is_alive(pid)]


async def test_a_node_that_loses_a_rank_ends(starter, tiny_llama: Path) -> None:
    cluster = starter.start(
        1, 1, ["--model", str(tiny_llama), *NODE], decode_args=["--tensor-parallel-size=2"]
    )
    node = cluster.nodes["d0"]
    async with cluster.client() as client:
        await client.complete((1, 2, 3), sampling=SamplingParams(max_tokens=2, ignore_eos=True))
        os.kill(_ranks_of(node.popen.pid)[0], signal.SIGKILL)
        asked = asyncio.create_task(
            client.complete((1, 2, 3), sampling=SamplingParams(max_tokens=2, ignore_eos=True), timeout_s=30)
        )
        assert await asyncio.to_thread(node.popen.wait, 60) == 1, node.log()
        asked.cancel()
    assert "rank-1 ended unexpectedly" in node.log()


def _ranks_of(pid: int) -> list[int]:
    """Processes that a node has started, but for Python's own resource tracker."""
    children: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        children.update(map(int, (task / "children").read_text().split()))
    return [
        child for child in children if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
