"""Every process of a cluster is restarted in turn while it is asked without pause: no request fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from kvrelay.client import AsyncClient
from kvrelay.core.sampling import SamplingParams
from tests.cluster.replicas import ReplicatedCluster

pytestmark = pytest.mark.cluster

NUM_PROMPTS = 6
SIM = [
    "--model=sim",
    "--engine.tokenizer=smollm2",
    "--num-blocks=2048",
    "--sim-prefill-base-s=0.01",
    "--sim-decode-base-s=0.01",
]
SMOLLM2 = ["--num-blocks=512", "--threads=1"]


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[[list[str]], ReplicatedCluster]]:
    started: list[ReplicatedCluster] = []

    def make(node_arguments: list[str]) -> ReplicatedCluster:
        started.append(ReplicatedCluster(tmp_path, node_arguments))
        started[-1].start()
        return started[-1]

    yield make
    for cluster in started:
        cluster.stop()


def prompt(index: int) -> str:
    return f"Question {index}: what is the name of river number {index}?"


@dataclass
class Load:
    """Asks again and again until told to stop; each answer must be the one that an unbroken run gave."""

    client: AsyncClient
    http: httpx.AsyncClient
    num_tokens: int
    expected: list[tuple[tuple[int, ...], str]] = field(default_factory=list)
    num_answers: int = 0
    faults: list[str] = field(default_factory=list)
    is_over: bool = False

    async def learn(self) -> None:
        """What the cluster answers while nothing happens to it."""
        for index in range(NUM_PROMPTS):
            result = await self._complete(index)
            self.expected.append((result.token_ids, result.text))
        assert all(len(token_ids) == self.num_tokens for token_ids, _ in self.expected)
        assert len(set(self.expected)) == NUM_PROMPTS

    async def ask_on(self, ask: Callable[[int], Awaitable[bool]], index: int) -> None:
        """One caller."""
        while not self.is_over:
            try:
                is_right = await ask(index % NUM_PROMPTS)
            except Exception as error:  # whatever it is, a caller has seen it
                self.faults.append(f"{ask.__name__}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.05)
            else:
                self.num_answers += 1
                if not is_right:
                    self.faults.append(f"{ask.__name__}: another answer to prompt {index % NUM_PROMPTS}")
            index += 1

    async def by_library(self, index: int) -> bool:
        return (await self._complete(index)).token_ids == self.expected[index][0]

    async def by_proxy(self, index: int) -> bool:
        answer = await self.http.post("/completions", json=self._body(index))
        assert answer.status_code == 200, answer.text
        return bool(answer.json()["choices"][0]["text"] == self.expected[index][1])

    async def by_proxy_streaming(self, index: int) -> bool:
        text = ""
        async with self.http.stream(
            "POST", "/completions", json={**self._body(index), "stream": True}
        ) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    text += event["choices"][0]["text"] if event["choices"] else ""
        return text == self.expected[index][1]

    async def _complete(self, index: int):
        sampling = SamplingParams(max_tokens=self.num_tokens, ignore_eos=True)
        return await self.client.complete(prompt(index), sampling=sampling)

    def _body(self, index: int) -> dict[str, object]:
        return {
            "prompt": prompt(index),
            "max_tokens": self.num_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }


async def _restart_under_load(cluster: ReplicatedCluster, num_tokens: int, num_callers: int) -> Load:
    limits = httpx.Limits(max_connections=None)
    async with (
        AsyncClient(cluster.routers) as client,
        httpx.AsyncClient(base_url=cluster.base_url, timeout=300, limits=limits) as http,
    ):
        load = Load(client, http, num_tokens)
        await load.learn()
        ways = (load.by_library, load.by_proxy, load.by_proxy_streaming)
        callers = [
            asyncio.create_task(load.ask_on(ways[index % len(ways)], index)) for index in range(num_callers)
        ]
        await cluster.restart_each()
        load.is_over = True
        await asyncio.gather(*callers)
    return load


@pytest.mark.parametrize("drain_timeout_s", [60, 0], ids=["finished", "handed back"])
async def test_a_rolling_restart_under_load_fails_no_request(make_cluster, drain_timeout_s: int) -> None:
    cluster = make_cluster([*SIM, f"--drain-timeout={drain_timeout_s}"])
    load = await _restart_under_load(cluster, num_tokens=100, num_callers=24)
    assert not load.faults
    assert load.num_answers > 24


@pytest.mark.model
async def test_a_rolling_restart_changes_no_token_of_a_real_model(make_cluster) -> None:
    cluster = make_cluster(SMOLLM2)
    load = await _restart_under_load(cluster, num_tokens=16, num_callers=3)
    assert not load.faults
    assert load.num_answers > 3
