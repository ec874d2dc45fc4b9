"""A process dies or leaves: the stream goes on, token for token, and the survivors then hold nothing."""

from __future__ import annotations

import asyncio
import signal

import pytest

from kvrelay.client import AsyncClient
from kvrelay.core.errors import KVRelayError, NodeUnavailable
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams

pytestmark = pytest.mark.cluster
PROMPT = tuple(range(40, 140))
SAMPLED = SamplingParams(max_tokens=400, temperature=0.9, seed=5, ignore_eos=True)


@pytest.fixture
def node_args(tiny_llama) -> list[str]:
    return ["--model", str(tiny_llama), "--num-blocks", "256"]


@pytest.fixture
def expected(run_alone, tiny_llama) -> tuple[int, ...]:
    return run_alone(tiny_llama, [TokenRequest(PROMPT, len(PROMPT), SAMPLED)])[0]


async def _stream_and(client: AsyncClient, act) -> tuple[list[int], object]:
    """Stream the answer; after 20 tokens call `act(decode node's id)`; returns all tokens and the result."""
    tokens: list[int] = []
    stream = client.generate(PROMPT, sampling=SAMPLED)
    acted = False
    async for chunk in stream:
        assert chunk.index == len(tokens)
        tokens.extend(chunk.token_ids)
        if len(tokens) >= 20 and not acted:
            acted = True
            await act()
    return tokens, stream.result


async def _num_live_requests(address: str) -> int:
    async with AsyncClient([address]) as client:
        return sum((await client.cluster_state()).num_requests.values())


def _decoding_node(state) -> str:
    return next(node.node_id for node in state.nodes if node.role == "decode" and node.num_attempts)


async def test_a_killed_decode_node_only_pauses_the_stream(starter, node_args, expected) -> None:
    cluster = starter.start(1, 2, node_args)
    async with cluster.client() as client:

        async def kill_decoder() -> None:
            state = await client.cluster_state()
            await asyncio.to_thread(cluster.nodes[_decoding_node(state)].kill)

        tokens, result = await _stream_and(client, kill_decoder)
    assert tuple(tokens) == expected
    assert result.report.num_attempts == 2
    await cluster.wait_idle()


async def test_a_drained_decode_node_finishes_its_stream_and_exits_cleanly(
    starter, node_args, expected
) -> None:
    cluster = starter.start(1, 1, node_args)
    async with cluster.client() as client:

        async def drain() -> None:
            cluster.nodes["d0"].popen.terminate()

        tokens, result = await _stream_and(client, drain)
    assert tuple(tokens) == expected
    assert result.report.num_attempts == 1
    assert await asyncio.to_thread(cluster.nodes["d0"].popen.wait, 30) == 0


async def test_a_killed_prefill_node_is_replaced_by_another(starter, node_args, expected) -> None:
    cluster = starter.start(2, 1, node_args)
    cluster.nodes["p0"].kill()
    async with cluster.client() as client:
        answers = await asyncio.gather(*(client.complete(PROMPT, sampling=SAMPLED) for _ in range(4)))
    assert {answer.token_ids for answer in answers} == {expected}
    await cluster.wait_idle()


async def test_without_a_decode_node_the_caller_is_told_which_role_is_missing(starter, node_args) -> None:
    cluster = starter.start(1, 0, node_args, router_args=["--node-wait-s", "0.2"])
    async with cluster.client() as client:
        with pytest.raises(NodeUnavailable, match="decode"):
            await client.complete(PROMPT, sampling=SAMPLED)


async def test_nodes_come_back_to_a_restarted_router_by_themselves(starter, node_args, expected) -> None:
    cluster = starter.start(1, 1, node_args)
    port = cluster.address.rpartition(":")[2]
    cluster.router.kill()
    cluster.router = starter.spawn_router(cluster.folder, ["--port", port])
    await cluster.wait_for_state("both nodes are attached", lambda state: len(state.nodes) == 2)
    async with cluster.client() as client:
        assert (await client.complete(PROMPT, sampling=SAMPLED)).token_ids == expected
    await cluster.wait_idle()


async def test_a_stream_survives_the_death_of_its_router(starter, node_args, expected) -> None:
    cluster = starter.start(1, 1, node_args)
    second = starter.spawn_router(cluster.folder, ["--port", "0"], name="router2")
    for role, name in [("prefill", "p9"), ("decode", "d9")]:
        starter.add_node(cluster, role, name, [*node_args, "--router", str(second.ready["grpc_address"])])
    for name in ["p9", "d9"]:
        await asyncio.to_thread(cluster.nodes[name].wait_ready)
    await cluster.wait_for_state("the first router has all nodes", lambda state: len(state.nodes) == 4)
    routers = {str(router.ready["grpc_address"]): router for router in (cluster.router, second)}
    async with AsyncClient(list(routers)) as client:

        async def kill_router() -> None:
            serving = [address for address in routers if await _num_live_requests(address)]
            assert len(serving) == 1
            await asyncio.to_thread(routers.pop(serving[0]).kill)

        tokens, result = await _stream_and(client, kill_router)
    (cluster.router,) = routers.values()
    assert tuple(tokens) == expected
    assert result.num_continuations == 1
    await cluster.wait_idle()


async def test_a_stream_goes_on_within_its_deadline_though_its_router_stands_still(
    starter, node_args, expected
) -> None:
    """A stopped process keeps its connections: it is missed only because it does not answer."""
    cluster = starter.start(1, 1, node_args)
    second = starter.spawn_router(cluster.folder, ["--port", "0"], name="router2")
    for role, name in [("prefill", "p9"), ("decode", "d9")]:
        starter.add_node(cluster, role, name, [*node_args, "--router", str(second.ready["grpc_address"])])
    for name in ["p9", "d9"]:
        await asyncio.to_thread(cluster.nodes[name].wait_ready)
    routers = {str(router.ready["grpc_address"]): router for router in (cluster.router, second)}
    tokens: list[int] = []
    stopped = None
    async with AsyncClient(list(routers)) as client:
        stream = client.generate(PROMPT, sampling=SAMPLED, timeout_s=45.0)
        async for chunk in stream:
            tokens.extend(chunk.token_ids)
            if len(tokens) >= 20 and stopped is None:
                (stopped,) = [routers[address] for address in routers if await _num_live_requests(address)]
                stopped.popen.send_signal(signal.SIGSTOP)
    assert stopped is not None
    stopped.popen.send_signal(signal.SIGCONT)
    assert tuple(tokens) == expected
    assert stream.result.num_continuations == 1
    await cluster.wait_idle()


async def test_errors_of_one_request_leave_the_others_alone(starter, node_args, expected) -> None:
    cluster = starter.start(1, 1, node_args)
    async with cluster.client() as client:
        good = asyncio.create_task(client.complete(PROMPT, sampling=SAMPLED))
        # The client refuses what is wrong in itself, the router what its model can't take.
        for bad, field in [([], "prompt"), ([10**6], "prompt_token_ids"), ([5] * 5000, "prompt_token_ids")]:
            with pytest.raises(KVRelayError) as caught:
                await client.complete(bad, sampling=SAMPLED)
            assert caught.value.field == field
        assert (await good).token_ids == expected
    await cluster.wait_idle()
