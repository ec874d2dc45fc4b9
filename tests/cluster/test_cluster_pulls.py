"""Prefixes that prefill nodes pull from other nodes: the answer is the computed one, whoever dies meanwhile,
and then nobody holds anything."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvrelay.client import AsyncClient, GenerationResult
from kvrelay.core.cluster_view import ClusterState
from kvrelay.core.errors import RequestCancelled
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.embedded_model import ensure_smollm2

pytestmark = pytest.mark.cluster

ROUTER = "benchmarks.ordered_router"
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
BLOCK = 16
RunAlone = Callable[[Path, Sequence[TokenRequest]], list[tuple[int, ...]]]


async def ask(
    client: AsyncClient, name: str, prompt: Sequence[int], *, at: str, pull: str = "-", num_tokens: int = 0
) -> GenerationResult:
    """Prefilled on node `at`, which pulls so many tokens from node `pull`."""
    request_id = f"{name}.{at}.{pull}.{num_tokens}"
    return await client.complete(prompt, sampling=GREEDY, request_id=request_id)


def text_tokens(smollm2: Path, text: str, num_tokens: int) -> tuple[int, ...]:
    from transformers import AutoTokenizer

    return tuple(AutoTokenizer.from_pretrained(smollm2).encode(text * (num_tokens // 4)))[:num_tokens]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return ensure_smollm2()


@pytest.fixture(scope="module", params=["tcp", "ucx"])
def real(request: pytest.FixtureRequest, module_starter, smollm2: Path):
    """2P+1D with SmolLM2; the decode node's blocks are of another size."""
    args = [
        "--model",
        str(smollm2),
        "--dtype",
        "float32",
        "--num-blocks",
        "512",
        "--transport",
        request.param,
    ]
    return module_starter.start(2, 1, args, decode_args=["--block-size", "24"], router_module=ROUTER)


@pytest.mark.model
async def test_a_pulled_prefix_gives_the_answer_of_a_computed_one(
    real, smollm2: Path, run_alone: RunAlone
) -> None:
    texts = ["The old library held many books. ", "Water boils at 100 degrees; ", "one, two, three: go! "]
    prompts = [text_tokens(smollm2, text, length) for text, length in zip(texts, (700, 330, 40), strict=True)]
    expected = run_alone(smollm2, [TokenRequest(prompt, len(prompt), GREEDY) for prompt in prompts])
    async with real.client() as client:
        for number, (prompt, answer) in enumerate(zip(prompts, expected, strict=True)):
            computed = await ask(client, f"a{number}", prompt, at="p0")
            pulled = await ask(client, f"b{number}", prompt, at="p1", pull="p0", num_tokens=len(prompt))
            assert computed.token_ids == pulled.token_ids == answer
            assert computed.report.num_pulled_tokens == 0
            assert pulled.report.prefill_node == "p1"
            assert pulled.report.num_pulled_tokens == len(prompt) // BLOCK * BLOCK
            assert pulled.report.num_cached_tokens == (len(prompt) - 1) // BLOCK * BLOCK
    state = await real.wait_idle()
    assert state.counters["pulls_failed"] == 0
    assert state.counters["pulled_tokens"] == sum(len(prompt) // BLOCK * BLOCK for prompt in prompts)


@pytest.mark.model
async def test_generated_kv_pulled_from_a_decode_node_gives_the_answer_of_computed_kv(
    real, smollm2: Path, run_alone: RunAlone
) -> None:
    prompt = text_tokens(smollm2, "Dear Sir or Madam, I am writing to you about ", 200)
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    async with real.client() as client:
        first = await client.complete(prompt, sampling=sampling, request_id="first.p0.-.0")
        turn = (*prompt, *first.token_ids, *text_tokens(smollm2, " And then?", 5))
        [expected] = run_alone(smollm2, [TokenRequest(turn, len(turn), GREEDY)])
        second = await ask(client, "second", turn, at="p1", pull="d0", num_tokens=256)
    assert second.token_ids == expected
    # The decode node has 240 of them in whole blocks of its own size, 40 generated ones among them.
    assert second.report.num_pulled_tokens == 240
    await real.wait_idle()


@pytest.mark.model
async def test_the_router_has_a_second_turns_answer_pulled_back_from_the_decode_node(
    starter, smollm2: Path, run_alone: RunAlone
) -> None:
    cluster = starter.start(1, 1, ["--model", str(smollm2), "--dtype", "float32", "--num-blocks", "512"])
    prompt = text_tokens(smollm2, "Dear Sir or Madam, I am writing to you about ", 200)
    async with cluster.client() as client:
        for number in range(4):  # what computing takes is learned from other prompts
            other = text_tokens(smollm2, f"Number {number} of the old books tells of ", 100 + 60 * number)
            await client.complete(other, sampling=GREEDY)
        first = await client.complete(prompt, sampling=SamplingParams(max_tokens=120, ignore_eos=True))
        await cluster.wait_for_state("nothing runs and the index is in step", is_in_step)
        turn = (*prompt, *first.token_ids, *text_tokens(smollm2, " And then?", 5))
        [expected] = run_alone(smollm2, [TokenRequest(turn, len(turn), GREEDY)])
        second = await client.complete(turn, sampling=GREEDY, request_id="second")
        explained = await client.explain("second")
    assert second.token_ids == expected
    assert explained.decision.pull_from == "d0"
    # The prefill node has 192 tokens of the prompt; the decode node 304, all but the last token it drew.
    assert second.report.num_pulled_tokens == 304 - 192
    assert second.report.num_cached_tokens == 304
    await cluster.wait_idle()


def is_in_step(state: ClusterState) -> bool:
    return not any(node.index_stale for node in state.nodes) and not any(state.num_requests.values())


# ---- faults: time-outs outlast every wait, so what comes back was released, not given up ---------------

PROMPT = tuple(range(3, 203))
NUM_TOKENS = 192
SIM = [
    "--model=sim",
    "--pull-timeout-s=600",
    "--progress-timeout-s=600",
    "--pending-offer-timeout-s=500",
    "--num-blocks=256",
]
ROUTER_ARGS = ["--lease-s=600", "--ack-timeout-s=500", "--node-silence-s=550"]


@pytest.fixture
def cluster(starter):
    return starter.start(2, 1, SIM, router_args=ROUTER_ARGS, router_module=ROUTER)


class Pulling:
    """A request whose prefill node p1 pulls from p0, of which `stopped` does nothing meanwhile: the pull is
    under way, and stays so."""

    def __init__(self, cluster, client: AsyncClient, stopped: str) -> None:
        self.cluster = cluster
        self.client = client
        self.stopped = stopped
        self.moving = "p1" if stopped == "p0" else "p0"
        self.expected: tuple[int, ...] = ()
        self.task: asyncio.Task[GenerationResult] | None = None

    async def __aenter__(self) -> Pulling:
        self.expected = (await ask(self.client, "first", PROMPT, at="p0")).token_ids
        await self.cluster.wait_idle()
        self.signal(self.stopped, signal.SIGSTOP)
        asked = ask(self.client, "it", PROMPT, at="p1", pull="p0", num_tokens=NUM_TOKENS)
        self.task = asyncio.create_task(asked)
        await self.cluster.wait_for_state(f"{self.moving} holds and waits", self._is_pulling)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.signal(self.stopped, signal.SIGCONT)

    def _is_pulling(self, state: ClusterState) -> bool:
        """The node that moves has blocks pinned, or reserved, and a transfer open."""
        load = next(node.load for node in state.nodes if node.node_id == self.moving)
        return load is not None and load.num_held_blocks > 0 and load.num_open_transfers > 0

    def signal(self, node: str, number: int) -> None:
        if self.cluster.nodes[node].popen.poll() is None:
            self.cluster.nodes[node].popen.send_signal(number)

    async def answer(self) -> GenerationResult:
        assert self.task is not None
        return await self.task


STOPPED = pytest.mark.parametrize("stopped", ["p0", "p1"], ids=["it waits", "it is sent"])


@STOPPED
async def test_a_killed_holder_costs_time_alone(cluster, stopped: str) -> None:
    async with cluster.client() as client, Pulling(cluster, client, stopped) as pulling:
        await asyncio.to_thread(cluster.nodes["p0"].kill)
        pulling.signal("p1", signal.SIGCONT)
        result = await pulling.answer()
    assert result.token_ids == pulling.expected
    report = result.report
    assert (report.prefill_node, report.num_attempts, report.num_pulled_tokens) == ("p1", 1, 0)
    state = await cluster.wait_idle()
    assert state.counters["pulls_failed"] == 1


@STOPPED
async def test_a_killed_prefill_node_leaves_nothing_pinned(cluster, stopped: str) -> None:
    async with cluster.client() as client, Pulling(cluster, client, stopped) as pulling:
        await asyncio.to_thread(cluster.nodes["p1"].kill)
        pulling.signal("p0", signal.SIGCONT)
        result = await pulling.answer()
    assert result.token_ids == pulling.expected
    assert (result.report.prefill_node, result.report.num_attempts) == ("p0", 2)
    await cluster.wait_idle()


@STOPPED
async def test_a_cancel_during_the_pull_frees_all_nodes(cluster, stopped: str) -> None:
    async with cluster.client() as client, Pulling(cluster, client, stopped) as pulling:
        await client.cancel(f"it.p1.p0.{NUM_TOKENS}")
        with pytest.raises(RequestCancelled):
            await pulling.answer()
    await cluster.wait_idle()


async def test_a_prefix_that_does_not_come_in_time_is_computed(starter) -> None:
    args = [*SIM, "--pull-timeout-s=0.5"]
    cluster = starter.start(2, 1, args, router_args=ROUTER_ARGS, router_module=ROUTER)
    async with cluster.client() as client, Pulling(cluster, client, "p0") as pulling:
        result = await pulling.answer()
    assert result.token_ids == pulling.expected
    assert result.report.num_pulled_tokens == 0
    await cluster.wait_idle()


async def test_many_pulls_at_once_are_answered_as_computed_prompts_are(starter) -> None:
    args = [*SIM, "--num-blocks=1024"]
    cluster = starter.start(2, 1, args, router_args=ROUTER_ARGS, router_module=ROUTER)
    prompts = [tuple(range(3 + number, 203 + 7 * number)) for number in range(20)]
    async with cluster.client() as client:
        computed = [await ask(client, f"a{number}", prompt, at="p0") for number, prompt in enumerate(prompts)]
        pulled = await asyncio.gather(
            *(
                ask(client, f"b{number}", prompt, at="p1", pull="p0", num_tokens=len(prompt))
                for number, prompt in enumerate(prompts)
            )
        )
    assert [result.token_ids for result in pulled] == [result.token_ids for result in computed]
    assert all(result.report.num_pulled_tokens > 0 for result in pulled)
    await cluster.wait_idle()
